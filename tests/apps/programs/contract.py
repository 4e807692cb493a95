"""What the HTTP servers and clients of this folder have in common.

GET /bytes/SIZE answers pattern(SIZE), POST /echo answers its body. A client is called
`CLIENT URL check SIZE... [echo=SIZE...]` and prints "checked N", or `CLIENT URL load SECONDS SIZE`
and prints the microseconds of each request, a line each.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Callable
from functools import cache

ROUNDS = 12  # of all sizes but the large ones
LARGE = 1_000_000


@cache
def pattern(size: int) -> bytes:
    """Bytes in which every 4-byte word differs, so that lost, doubled or swapped ones show."""
    words = array("I", range(-(-size // 4)))
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()[:size]


def compare(got: bytes, wanted: bytes) -> None:
    """Raises ValueError that says where two bodies part."""
    if got != wanted:
        at = next((i for i, pair in enumerate(zip(got, wanted)) if pair[0] != pair[1]), None)
        raise ValueError(f"{len(got)} of {len(wanted)} bytes, first difference at {at}")


Get = Callable[[str], bytes]
Post = Callable[[str, bytes], bytes]


def plan(arguments: list[str]) -> tuple[list[int], list[int]]:
    """The sizes to get and those to have echoed, each as often as it is due."""
    gets = [int(each) for each in arguments if "=" not in each]
    posts = [int(each.partition("=")[2]) for each in arguments if "=" in each]
    return _repeated(gets), _repeated(posts)


def _repeated(sizes: list[int]) -> list[int]:
    small = [each for each in sizes if each < LARGE]
    return small * ROUNDS + [each for each in sizes if each >= LARGE]


def main(get: Get, post: Post) -> None:
    """A client's main program; get and post take the path."""
    _url, command, *arguments = sys.argv[1:]
    if command == "check":
        gets, posts = plan(arguments)
        for size in gets:
            compare(get(f"/bytes/{size}"), pattern(size))
        for size in posts:
            compare(post("/echo", pattern(size)), pattern(size))
        print(f"checked {len(gets) + len(posts)}")
        return
    seconds, wanted = float(arguments[0]), arguments[1]
    end = time.perf_counter() + seconds
    taken = []
    now = time.perf_counter()
    while now < end:
        get(f"/bytes/{wanted}")
        before, now = now, time.perf_counter()
        taken.append((now - before) * 1e6)
    print("\n".join(f"{each:.1f}" for each in taken))
