# SPDX-License-Identifier: Apache-2.0
"""Connects and talks in step with its twin: `traffic_twins.py FILE 0|1 ROUNDS`, one on each CPU.

Both use the same tuples, 127.0.0.1:p -> 127.0.0.1:8080, each in a namespace of its own, and
connect at the same instant: then the kernel draws the same sequence numbers for both, but for a
clock of 64 ns. FILE, 16 bytes long, is shared between them. Prints JSON: how many bytes came that
were not its own, and each round's two sequence numbers.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import struct
import sys
import time
from pathlib import Path

SERVER = ("127.0.0.1", 8080)
FIRST_PORT, PORTS = 20_000, 8_000
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21  # linux/tcp.h
REPAIR_OFF_NO_WP = -1
RECV_QUEUE, SEND_QUEUE = 1, 2
PATIENCE_S = 1.0
EXCHANGES, PAUSE_S = 24, 0.002


def sequence_numbers(sock: socket.socket) -> list[int]:
    """The next byte to send and the next to receive, as CRIU reads them; needs CAP_NET_ADMIN."""
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    found = []
    for queue in (SEND_QUEUE, RECV_QUEUE):
        sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
        found.append(sock.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_NO_WP)
    return found


class Barrier:
    """Two processes leave wait() within a few hundred nanoseconds of each other."""

    def __init__(self, path: Path, me: int) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 16)
        self._me, self._passed = me, 0

    def wait(self) -> None:
        self._passed += 1
        passed = memoryview(self._memory).cast("q")
        passed[self._me] = self._passed
        while passed[1 - self._me] < self._passed:
            pass


def talk(left: socket.socket, right: socket.socket, text: bytes) -> bool:
    """Whether exactly this text comes out at the other end."""
    left.sendall(text)
    try:
        return right.recv(100) == text
    except TimeoutError:
        return False


def main() -> None:
    path, me, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[me]})
    barrier = Barrier(path, me)
    wrong, numbers = 0, []
    with socket.create_server(SERVER) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(rounds):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.bind(("127.0.0.1", FIRST_PORT + number % PORTS))
                barrier.wait()
                client.connect(SERVER)
                server, _ = listener.accept()
                with server:
                    numbers.append(sequence_numbers(client))
                    for sock in (client, server):
                        sock.settimeout(PATIENCE_S)
                    for _ in range(EXCHANGES):  # passes go on: some of them bypass
                        text = f"round {number} of twin {me}".encode()
                        wrong += not talk(server, client, text)
                        wrong += not talk(client, server, text)
                        time.sleep(PAUSE_S)
                    barrier.wait()
    print(json.dumps({"wrong": wrong, "numbers": numbers}))


if __name__ == "__main__":
    main()
