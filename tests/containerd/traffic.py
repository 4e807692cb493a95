# SPDX-License-Identifier: Apache-2.0
"""Connections between two pods, every byte checked, for as long as a test wants them.

Run in a pod: `python traffic.py serve [ADDRESS]`, and `python traffic.py ask ADDRESS` in another
one, which ends with SIGTERM and then prints a Report.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

PORT = 9191
LASTING = 4  # connections that stay open all the time
LONGEST = 5000  # bytes of a message
PAUSE_S = 0.002
TIMEOUT_S = 20
BRIEF_ROUNDS = 300  # long enough to join
FOR_EVER_S = 86_400


@dataclass
class Report:
    """What the client has seen; rounds of the lasting connections each, and of all others."""

    lasting: list[int] = field(default_factory=list)
    brief: int = 0  # connections that were opened, used and closed
    errors: list[str] = field(default_factory=list)


def set_nodelay(made: socket.socket) -> None:
    """Without TCP_NODELAY no socket joins."""
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        set_nodelay(self.request)
        while data := self.request.recv(65536):
            self.request.sendall(data)


def serve(address: str = "") -> None:
    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        allow_reuse_address = True
        daemon_threads = True

    socket.setdefaulttimeout(FOR_EVER_S)  # O_NONBLOCK: blocking readers never join
    with Server((address, PORT), Echo) as server:
        print("listening", flush=True)
        server.serve_forever()


def exchange(connection: socket.socket, source: random.Random) -> None:
    """One message there and back; raises AssertionError or OSError."""
    sent = source.randbytes(source.randint(1, LONGEST))
    connection.sendall(sent)
    received = b""
    while len(received) < len(sent):
        chunk = connection.recv(65536)
        assert chunk, "the connection ended"
        received += chunk
    assert received == sent, "the bytes that came back are others"


def ask(address: str) -> None:
    report = Report(lasting=[0] * LASTING)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def connect() -> socket.socket:
        made = socket.create_connection((address, PORT), TIMEOUT_S)
        set_nodelay(made)
        return made

    def last(number: int) -> None:
        source = random.Random(number)
        with connect() as connection:
            while not stop.wait(PAUSE_S):
                exchange(connection, source)
                report.lasting[number] += 1

    def come_and_go() -> None:
        source = random.Random(-1)
        while not stop.is_set():
            with connect() as connection:
                for _ in range(BRIEF_ROUNDS):
                    exchange(connection, source)
                    time.sleep(PAUSE_S)
            report.brief += 1

    def guarded(work: object, *arguments: int) -> None:
        try:
            work(*arguments)  # type: ignore[operator]
        except (OSError, AssertionError) as error:
            report.errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=guarded, args=(last, each)) for each in range(LASTING)]
    threads.append(threading.Thread(target=guarded, args=(come_and_go,)))
    for thread in threads:
        thread.start()
    print("asking", flush=True)
    for thread in threads:
        thread.join()
    print(json.dumps(asdict(report)))


class Traffic:
    """The client's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def end(self) -> Report:
        """End it; what it has seen."""
        os.kill(innermost(self._process.pid), signal.SIGTERM)
        out, _ = self._process.communicate(timeout=TIMEOUT_S)
        return Report(**json.loads(out))


def innermost(pid: int) -> int:
    """The process itself, or its child: nsenter(1) forks to enter a PID namespace."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return innermost(int(children[0])) if children else pid


@contextmanager
def started(argv: Sequence[str | Path]) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed its first line; killed on leaving."""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            yield process
        finally:
            if process.poll() is None:
                os.kill(innermost(process.pid), signal.SIGKILL)
            process.kill()


if __name__ == "__main__":
    {"serve": serve, "ask": ask}[sys.argv[1]](*sys.argv[2:])
