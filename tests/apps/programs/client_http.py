"""The contract's client with http.client: one connection, a socket with a timeout."""

from __future__ import annotations

import http.client
import sys
import urllib.parse

from tests.apps.programs import contract

TIMEOUT_S = 15  # without a byte

connection = http.client.HTTPConnection(
    urllib.parse.urlsplit(sys.argv[1]).netloc, timeout=TIMEOUT_S
)


def ask(method: str, path: str, body: bytes | None = None) -> bytes:
    """One request; raises what http.client raises."""
    connection.request(method, path, body)
    answer = connection.getresponse()
    read = answer.read()
    if answer.status != 200:
        raise ValueError(f"{method} {path}: {answer.status} {read[:200]!r}")
    return read


if __name__ == "__main__":
    contract.main(lambda path: ask("GET", path), lambda path, body: ask("POST", path, body))
    connection.close()
