# SPDX-License-Identifier: Apache-2.0
"""What an application sees that closes a file while a pass holds it, under passes back to back.

The passer then closes the file, at the end of its read(2) of the iterator.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import statistics
import time
from collections.abc import Callable
from typing import Any

from tests.light import SERVER_IP, LightPod, accelerated

FILES = (100, 10_000)  # other open files of the process

Ends = tuple[socket.socket, socket.socket]


def pair(listener: socket.socket) -> Ends:
    client = socket.create_connection(listener.getsockname())
    return client, listener.accept()[0]


def late_fin(listener: socket.socket) -> float:
    """By how many microseconds the FIN comes after close(2) has returned; 0: it has come."""
    client, server = pair(listener)
    with server:
        server.setblocking(False)
        client.close()
        began = time.perf_counter_ns()
        is_late = False
        while True:
            with contextlib.suppress(BlockingIOError):
                server.recv(1)
                return (time.perf_counter_ns() - began) / 1e3 if is_late else 0
            is_late = True


def stale_event(listener: socket.socket) -> float:
    """Does epoll report a socket that has been closed? 1 if so."""
    client, server = pair(listener)
    with client, select.epoll() as poller:
        poller.register(server, select.EPOLLIN)
        client.send(b"x")
        server.close()
        return len(poller.poll(0))


def address_in_use(_: socket.socket) -> float:
    """Is a listener's address still taken when it has been closed? 1 if so."""
    listener = socket.create_server((SERVER_IP, 0))
    address = listener.getsockname()
    listener.close()
    try:
        socket.create_server(address).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return 1
    return 0


PROBES: tuple[Callable[[socket.socket], float], ...] = (late_fin, stale_event, address_in_use)


def application(pod: LightPod, files: int, seconds: float, answer: int) -> None:
    pod.enter()
    fds = [os.open("/dev/null", os.O_RDONLY)]
    fds += [os.dup(fds[0]) for _ in range(files - 1)]
    for fd in fds[1:9]:  # for the probes' sockets: the rest of a pass is yet to come then
        os.close(fd)
    found = {}
    with socket.create_server((SERVER_IP, 0)) as listener:
        for probe in PROBES:
            end, values = time.monotonic() + seconds / len(PROBES), []
            while time.monotonic() < end:
                values.append(probe(listener))
            hits = sorted(value for value in values if value)
            found[probe.__name__] = {"closed": len(values), "hit": len(hits)}
            if probe is late_fin and hits:
                median, longest = statistics.median(hits), hits[-1]
                found[probe.__name__] |= {"median us": round(median), "longest us": round(longest)}
    os.write(answer, json.dumps(found).encode())


def observe(pod: LightPod, files: int, seconds: float, passing: bool) -> dict[str, Any]:
    answer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            application(pod, files, seconds, answer[1])
        finally:
            os._exit(0)
    os.close(answer[1])
    passes = 0
    with os.fdopen(answer[0], "rb") as line:
        poller = select.poll()
        poller.register(line, select.POLLIN)
        while not poller.poll(0 if passing else 1000):
            if passing:
                pod.visit()
                passes += 1
        found: dict[str, Any] = json.loads(line.read() or b"null")
    os.waitpid(pid, 0)
    return {"passes a second": round(passes / seconds), **found}


def main(seconds: float = 20) -> dict[str, Any]:
    """Seconds of each row."""
    found: dict[str, Any] = {"load": os.getloadavg()[0]}
    with accelerated(passes=False) as pod:
        for files in FILES:
            found[f"{files} files, no passes"] = observe(pod, files, seconds, passing=False)
            found[f"{files} files, passes"] = observe(pod, files, seconds, passing=True)
    return found
