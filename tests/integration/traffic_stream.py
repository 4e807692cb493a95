# SPDX-License-Identifier: Apache-2.0
"""Random bytes in both directions of a connection, every one of them checked."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Callable

Work = Callable[[socket.socket, int, random.Random], None]
SIZES = (1, 64, 1_000, 4_096, 65_536)


class Streams:
    """Traffic both ways on a connection, from now until `finish()`."""

    def __init__(self, left: socket.socket, right: socket.socket, seed: int) -> None:
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self.received = {0: 0, 1: 0}  # bytes so far, by the receiving side
        self._sent: dict[int, str] = {}
        self._heard: dict[int, str] = {}
        ends = (left, right)
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, ends[side], side, seed), daemon=True)
            for side in (0, 1)
            for work in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def _guarded(self, work: Work, sock: socket.socket, side: int, seed: int) -> None:
        try:
            work(sock, side, random.Random(seed + side))
        except BaseException as error:
            self._failures.append(error)
            self._stop.set()

    def _send(self, sock: socket.socket, side: int, seeded: random.Random) -> None:
        digest = hashlib.sha256()
        while not self._stop.is_set():
            data = seeded.randbytes(seeded.choice(SIZES))
            sock.sendall(data)
            digest.update(data)
            if seeded.random() < 0.3:
                time.sleep(seeded.random() * 0.004)
        sock.shutdown(socket.SHUT_WR)
        self._sent[side] = digest.hexdigest()

    def _receive(self, sock: socket.socket, side: int, seeded: random.Random) -> None:
        digest = hashlib.sha256()
        while data := sock.recv(seeded.choice((100, 4_096, 1 << 20))):
            digest.update(data)
            self.received[side] += len(data)
        self._heard[side] = digest.hexdigest()

    def flow(self, patience_s: float = 10.0) -> None:
        """Wait until some more bytes have arrived at both ends."""
        before, deadline = dict(self.received), time.monotonic() + patience_s
        while any(self.received[side] < before[side] + 200_000 for side in (0, 1)):
            if self._failures:
                raise self._failures[0]
            assert time.monotonic() < deadline, f"stalled at {self.received}"
            time.sleep(0.01)

    def finish(self) -> int:
        """Both directions end; every byte has arrived, in order. Returns how many."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=20)
        if self._failures:
            raise self._failures[0]
        assert not any(thread.is_alive() for thread in self._threads), "a direction does not end"
        assert [self._heard[1], self._heard[0]] == [self._sent[0], self._sent[1]]
        return sum(self.received.values())
