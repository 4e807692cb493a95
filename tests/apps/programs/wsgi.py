# SPDX-License-Identifier: Apache-2.0
"""The contract as a WSGI application."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.apps.programs.contract import pattern

HEADERS = [("Content-Type", "application/octet-stream")]


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    """PEP 3333."""
    if environ["REQUEST_METHOD"] == "POST":
        body: bytes = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    else:
        body = pattern(int(environ["PATH_INFO"].rpartition("/")[2]))
    start_response("200 OK", [*HEADERS, ("Content-Length", str(len(body)))])
    return [body]
