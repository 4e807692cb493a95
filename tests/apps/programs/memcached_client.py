# SPDX-License-Identifier: Apache-2.0
"""memcached's text protocol: `memcached_client HOST PORT check`, or `... load SECONDS SIZE`.

check prints "checked N", load the microseconds of each get, a line each.
"""

from __future__ import annotations

import asyncio
import sys
import time

from tests.apps.programs.contract import compare, passes, pattern

SIZES = (0, 1, 100, 1000, 16_384, 65_537, 1_000_000, 8_000_000)
CONNECTIONS = 4
TIMEOUT_S = 20


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def set(self, key: bytes, value: bytes) -> None:
        """Store a value."""
        self.writer.write(b"set %s 0 0 %d\r\n%s\r\n" % (key, len(value), value))
        await self.writer.drain()
        compare(await self.reader.readline(), b"STORED\r\n")

    async def get(self, key: bytes) -> bytes:
        """Fetch a value; the answer has one line before and one after."""
        self.writer.write(b"get %s\r\n" % key)
        size = int((await self.reader.readline()).split()[3])
        value = await self.reader.readexactly(size + 2)
        compare(await self.reader.readline(), b"END\r\n")
        return value[:-2]


async def opened(host: str, port: int) -> Client:
    """A new connection."""
    return Client(*await asyncio.open_connection(host, port, limit=1 << 20))


async def check(host: str, port: int) -> None:
    """Every size on every connection, all at once."""

    async def one(number: int) -> int:
        client, checked = await opened(host, port), 0
        for size in passes(SIZES):
            key = b"%d-%d" % (number, size)
            await client.set(key, pattern(size))
            compare(await client.get(key), pattern(size))
            checked += 1
        client.writer.close()
        return checked

    done = await asyncio.wait_for(asyncio.gather(*map(one, range(CONNECTIONS))), TIMEOUT_S)
    print("checked", sum(done))


async def load(host: str, port: int, seconds: float, size: int) -> None:
    """Gets on several connections at once."""
    taken: list[float] = []
    end = time.perf_counter() + seconds

    async def one() -> None:
        client = await opened(host, port)
        await client.set(b"key", pattern(size))
        now = time.perf_counter()
        while now < end:
            await client.get(b"key")
            before, now = now, time.perf_counter()
            taken.append((now - before) * 1e6)

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    print("\n".join(f"{each:.1f}" for each in taken))


if __name__ == "__main__":
    _, host, port, command, *rest = sys.argv
    if command == "check":
        asyncio.run(check(host, int(port)))
    else:
        asyncio.run(load(host, int(port), float(rest[0]), int(rest[1])))
