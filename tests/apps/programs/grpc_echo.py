# SPDX-License-Identifier: Apache-2.0
"""gRPC without generated code: bytes there and back, unary and streaming.

`grpc_echo.py serve PORT`, `grpc_echo.py check ADDRESS`, `grpc_echo.py load ADDRESS SECONDS SIZE`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

from tests.apps.programs.contract import compare, pattern

SIZES = (0, 1, 1000, 16_384, 65_537, 1_000_000, 4_000_000)
CALLS = 1000  # small ones, so that its connections live for long enough to join
STREAMED = 40
TIMEOUT_S = 30
OPTIONS = [
    ("grpc.max_receive_message_length", 8 << 20),
    ("grpc.max_send_message_length", 8 << 20),
    ("grpc.use_local_subchannel_pool", 1),
]


def _unary(message: bytes, _context: Any) -> bytes:
    return message


def _stream(messages: Iterator[bytes], _context: Any) -> Iterator[bytes]:
    yield from messages


def serve(port: int) -> None:
    """Serve for ever."""
    server = grpc.server(
        futures.ThreadPoolExecutor(8), options=[*OPTIONS, ("grpc.so_reuseport", 0)]
    )
    handlers: dict[str, Any] = {
        "Unary": grpc.unary_unary_rpc_method_handler(_unary),
        "Stream": grpc.stream_stream_rpc_method_handler(_stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", handlers),))
    server.add_insecure_port(f"0.0.0.0:{port}")
    server.start()
    server.wait_for_termination()


def check(channel: grpc.Channel) -> None:
    """All sizes, one by one, then streamed both ways."""
    unary: Any = channel.unary_unary("/echo.Echo/Unary")
    stream: Any = channel.stream_stream("/echo.Echo/Stream")
    checked = 0
    for size in SIZES:
        for _ in range(CALLS if size == 1 else 10 if size < 1_000_000 else 2):
            compare(unary(pattern(size), timeout=TIMEOUT_S), pattern(size))
            checked += 1
        count = STREAMED if size < 1_000_000 else 3
        sent = (pattern(size) for _ in range(count))
        for got in stream(sent, timeout=TIMEOUT_S):
            compare(got, pattern(size))
            checked += 1
    print("checked", checked)


def load(channel: grpc.Channel, seconds: float, size: int) -> None:
    """Unary calls, one after the other."""
    unary: Any = channel.unary_unary("/echo.Echo/Unary")
    unary(b"", timeout=TIMEOUT_S)
    taken = []
    now = time.perf_counter()
    end = now + seconds
    while now < end:
        unary(pattern(size), timeout=TIMEOUT_S)
        before, now = now, time.perf_counter()
        taken.append((now - before) * 1e6)
    print("\n".join(f"{each:.1f}" for each in taken))


def main(command: str, where: str, *rest: str) -> None:
    """One of the three commands."""
    if command == "serve":
        return serve(int(where))
    with grpc.insecure_channel(where, options=OPTIONS) as channel:
        if command == "check":
            return check(channel)
        return load(channel, float(rest[0]), int(rest[1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
