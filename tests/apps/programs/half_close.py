# SPDX-License-Identifier: Apache-2.0
"""Reads all that a client sends, to its end, and only then answers with it: `half_close PORT`."""

from __future__ import annotations

import asyncio
import sys

PIECES = 10
PAUSE_S = 0.02


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection; its client has shut down its side when the answer begins."""
    got = await reader.read()
    piece = -(-len(got) // PIECES) or 1
    for start in range(0, len(got), piece):
        writer.write(got[start : start + piece])
        await writer.drain()
        await asyncio.sleep(PAUSE_S)
    writer.close()


async def main(port: int) -> None:
    """Serve for ever."""
    server = await asyncio.start_server(serve, "0.0.0.0", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
