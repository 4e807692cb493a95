# SPDX-License-Identifier: Apache-2.0
"""Redis' protocol by hand: `redis_check.py HOST PORT`; one connection, blocking with a timeout."""

from __future__ import annotations

import socket
import sys
from typing import BinaryIO

from tests.apps.programs.contract import compare, passes, pattern

SIZES = (0, 1, 64, 1000, 16_384, 65_537, 1_000_000, 10_000_000)
PIPELINED = 500
TIMEOUT_S = 20


def command(*words: bytes) -> bytes:
    """A command in RESP."""
    parts = [b"*%d\r\n" % len(words)]
    parts += [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
    return b"".join(parts)


def answer(stream: BinaryIO) -> bytes:
    """One answer: a status or a string."""
    line = stream.readline()
    if not line.startswith(b"$"):
        return line.strip()
    size = int(line[1:])
    return stream.read(size + 2)[:-2]


def main(host: str, port: int) -> None:
    """Set and get values one by one, then in pipelines."""
    checked = 0
    with socket.create_connection((host, port), TIMEOUT_S) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream = connection.makefile("rb")
        for size in passes(SIZES):
            connection.sendall(command(b"SET", b"key", pattern(size)))
            compare(answer(stream), b"+OK")
            connection.sendall(command(b"GET", b"key"))
            compare(answer(stream), pattern(size))
            checked += 1
        for size in (10, 1000):
            values = [b"%d/%s" % (number, pattern(size)) for number in range(PIPELINED)]
            connection.sendall(b"".join(command(b"ECHO", value) for value in values))
            for value in values:
                compare(answer(stream), value)
                checked += 1
    print("checked", checked)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
