# SPDX-License-Identifier: Apache-2.0
"""The contract's client with aiohttp: asyncio's event loop."""

from __future__ import annotations

import asyncio
import sys

import aiohttp

from tests.apps.programs import contract


def main() -> None:
    """Run the contract on a loop of its own."""
    loop = asyncio.new_event_loop()

    async def opened() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30))

    session = loop.run_until_complete(opened())

    async def ask(method: str, path: str, body: bytes | None = None) -> bytes:
        async with session.request(method, sys.argv[1] + path, data=body) as answer:
            answer.raise_for_status()
            return await answer.read()

    contract.main(
        lambda path: loop.run_until_complete(ask("GET", path)),
        lambda path, body: loop.run_until_complete(ask("POST", path, body)),
    )
    loop.run_until_complete(session.close())


if __name__ == "__main__":
    main()
