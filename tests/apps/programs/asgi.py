# SPDX-License-Identifier: Apache-2.0
"""The contract as an ASGI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tests.apps.programs.contract import pattern

Message = dict[str, Any]


async def app(
    scope: Message,
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    """ASGI 3, HTTP only."""
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    if scope["method"] == "POST":
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
    else:
        body = pattern(int(scope["path"].rpartition("/")[2]))
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
