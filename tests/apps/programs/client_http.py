# SPDX-License-Identifier: Apache-2.0
"""The contract's client with http.client: one connection, a socket with a timeout."""

from __future__ import annotations

import http.client
import ssl
import sys
import urllib.parse

from tests.apps.programs import contract

TIMEOUT_S = 15  # without a byte


def opened(url: str) -> http.client.HTTPConnection:
    """A connection to the server of this URL, whose certificate is anybody's."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https":
        context = ssl._create_unverified_context()
        return http.client.HTTPSConnection(parts.netloc, timeout=TIMEOUT_S, context=context)
    return http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT_S)


connection = opened(sys.argv[1])


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
