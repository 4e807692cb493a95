# SPDX-License-Identifier: Apache-2.0
"""What the HTTP servers and clients of this folder have in common.

GET /bytes/SIZE answers pattern(SIZE), POST /echo answers its body. A client is called
`CLIENT URL check SIZE... [echo=SIZE...]` and prints "checked N", or `CLIENT URL load SECONDS SIZE`
and prints the microseconds of each request, a line each. Python's also take then=SIZE...: got and
echoed once each, after all others.
"""

from __future__ import annotations

import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cache

# Small sizes again and again, for connections to live until they are joined; large ones once.
PASSES = 16
LASTING_S = 0.7
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


def passes(sizes: Sequence[int], lasting_s: float = LASTING_S) -> Iterator[int]:
    """The sizes as often as each is due."""
    yield from sizes
    small = [each for each in sizes if each < LARGE]
    if not small:
        return
    done, end = 1, time.monotonic() + lasting_s
    while done < PASSES or time.monotonic() < end:
        yield from small
        done += 1


def _sizes(prefix: str, arguments: Sequence[str]) -> list[int]:
    return [int(each[len(prefix) :]) for each in arguments if each.startswith(prefix)]


def main(get: Get, post: Post) -> None:
    """A client's main program; get and post take the path."""
    _url, command, *arguments = sys.argv[1:]
    if command == "check":
        checked = 0
        for size in passes([int(each) for each in arguments if "=" not in each]):
            compare(get(f"/bytes/{size}"), pattern(size))
            checked += 1
        echoed = _sizes("echo=", arguments)
        for size in passes(echoed, 0 if checked else LASTING_S):  # the connection has joined by now
            compare(post("/echo", pattern(size)), pattern(size))
            checked += 1
        for size in _sizes("then=", arguments):
            compare(get(f"/bytes/{size}"), pattern(size))
            compare(post("/echo", pattern(size)), pattern(size))
            checked += 2
        print(f"checked {checked}")
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
