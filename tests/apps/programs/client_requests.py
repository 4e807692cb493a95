# SPDX-License-Identifier: Apache-2.0
"""The contract's client with requests: a session, blocking sockets."""

from __future__ import annotations

import sys

import requests

from tests.apps.programs import contract

session = requests.Session()


def ask(method: str, path: str, body: bytes | None = None) -> bytes:
    """One request; raises what requests raises."""
    answer = session.request(method, sys.argv[1] + path, data=body, timeout=None)
    answer.raise_for_status()
    return answer.content


if __name__ == "__main__":
    contract.main(lambda path: ask("GET", path), lambda path, body: ask("POST", path, body))
    session.close()
