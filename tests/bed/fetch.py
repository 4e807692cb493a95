# SPDX-License-Identifier: Apache-2.0
"""An application that checks what it gets: `fetch.py URL TIMES PATH=SIZE...`, run in a pod.

Fetches each path TIMES times over one kept-alive connection and compares every body with
`pattern(SIZE)`. Prints one line per difference and a last line "fetched N".
"""

import http.client
import sys
import urllib.parse
from collections.abc import Sequence


def pattern(size: int) -> bytes:
    """Bytes in which every 4-byte word differs, so that lost, doubled or swapped ones show."""
    return b"".join(word.to_bytes(4, "big") for word in range(-(-size // 4)))[:size]


def difference(path: str, wanted: bytes, got: bytes) -> str:
    """Where two bodies part."""
    at = next((i for i, pair in enumerate(zip(wanted, got)) if pair[0] != pair[1]), None)
    return f"{path}: {len(got)} of {len(wanted)} bytes, first difference at {at}"


def main(arguments: Sequence[str]) -> None:
    """Fetch and compare everything; raises what http.client raises."""
    url, times, *files = arguments
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=20)
    fetched = 0
    for file in files:
        path, _, size = file.partition("=")
        wanted = pattern(int(size))
        for _ in range(int(times)):
            connection.request("GET", f"/{path}")
            got = connection.getresponse().read()
            if got != wanted:
                print(difference(path, wanted, got))
            fetched += 1
    print(f"fetched {fetched}")


if __name__ == "__main__":
    main(sys.argv[1:])
