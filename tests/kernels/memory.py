# SPDX-License-Identifier: Apache-2.0
"""Suite: receivers that rest in a container whose memory limit is near, as JSON.

Their connections' unread bytes count to the container (cgroup2's memory controller, which the
machine that runs the tests may not have). It must not be killed for what was bypassed to it.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from bpf.loader import Programs
from cni_plugin import names
from tests.bed import cgroups
from tests.kernels.probe import owned_by
from tests.light import (
    CLIENT_IP,
    LIMITS,
    SERVER_IP,
    LightPod,
    accelerated,
    away_from_pods,
    remove_cgroup,
    set_nodelay,
)

CONNECTIONS = 24
LIMIT = 64 << 20  # bytes; a 16th of it is nobody's but the container's
WRITE = 16 << 10
GREETINGS, GREETING_S = 20, 0.02
REST_S = 3
TIMEOUT_S = 60
PATTERN = bytes(range(251)) * (WRITE // 251 + 2)
DISK = Path("/dev/loop0")


@dataclass(frozen=True)
class Situation:
    """How much of its limit the container has free, or whether file cache has taken that."""

    name: str
    free: int = 0  # bytes
    is_cached: bool = False


@dataclass(frozen=True)
class Found:
    """In bytes: unread at rest as the container is charged, and bypassed in all. `missing`: what
    the container has, but is not charged, once everything is read."""

    situation: str
    sent: int
    received: int
    wrong: int  # connections
    charged: int
    missing: int
    bypassed: int
    killed: int
    errors: list[str]


SITUATIONS = (
    Situation("room", 48 << 20),
    Situation("tight", 8 << 20),
    Situation("full", 4 << 20),
    Situation("cached", is_cached=True),
)


def number(folder: Path, file: str, key: str | None = None) -> int:
    """The content of a file of the memory controller, or of its line `key`."""
    text = (folder / file).read_text()
    return int(text if key is None else dict(line.split() for line in text.splitlines())[key])


def expected(start: int, size: int) -> bytes:
    """A part of what each connection says."""
    return PATTERN[start % 251 :][:size]


def fill(container: Path, situation: Situation) -> bytearray:
    """Leaves the container `free` bytes; the file cache takes the rest of them if it may."""
    if situation.is_cached:
        with DISK.open("rb") as disk:
            while disk.read(1 << 20):
                pass
        number(container, "memory.stat", "inactive_file")  # brings the kernel's own up to date
        return bytearray()
    return bytearray(LIMIT - number(container, "memory.current") - situation.free)


def take_in(connections: Sequence[socket.socket]) -> tuple[int, int]:
    """Reads all to the end: bytes, and how many connections said anything wrong."""
    received = wrong = 0
    for connection in connections:
        so_far, right = 0, True
        while data := connection.recv(WRITE):
            right &= data == expected(so_far, len(data))
            so_far += len(data)
        received += so_far
        wrong += not right
    return received, wrong


def rest(container: Path, situation: Situation, pipe: Connection) -> None:
    """The receiver: fills its container, reads nothing until it is told to, then everything."""
    (container / "cgroup.procs").write_text("0")
    with socket.create_server((SERVER_IP, 8080), backlog=CONNECTIONS) as listener:
        pipe.send("listening")
        connections = [listener.accept()[0] for _ in range(CONNECTIONS)]
    set_nodelay(*connections)
    for each in connections:
        each.settimeout(TIMEOUT_S)
    for _ in range(GREETINGS):
        for each in connections:
            each.sendall(each.recv(1))
    filling = fill(container, situation)
    pipe.send("resting")
    pipe.recv()
    del filling
    pipe.send(take_in(connections))
    pipe.recv()


def greet(pod: LightPod, connections: Sequence[socket.socket]) -> None:
    """Says so much that both ends of each have joined."""
    for _ in range(GREETINGS):
        for each in connections:
            each.sendall(b"a")
            each.recv(1)
        time.sleep(GREETING_S)
    deadline = time.monotonic() + TIMEOUT_S
    while pod.members() < 2 * CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.1)
    for each in connections:
        each.setblocking(False)


def press(connections: Sequence[socket.socket]) -> tuple[list[int], list[str]]:
    """Sends for REST_S what goes without waiting: bytes of each connection, and errors."""
    sent = [0] * len(connections)
    errors = []
    deadline = time.monotonic() + REST_S
    while time.monotonic() < deadline:
        for place, connection in enumerate(connections):
            try:
                sent[place] += connection.send(expected(sent[place], WRITE))
            except BlockingIOError:
                continue
            except OSError as error:
                errors.append(str(error))
        time.sleep(0.02)
    return sent, errors


def connect(stack: ExitStack) -> list[socket.socket]:
    connections = []
    with owned_by(names.PROXY_UID):
        for _ in range(CONNECTIONS):
            address = (SERVER_IP, 8080)
            made = socket.create_connection(address, TIMEOUT_S, (CLIENT_IP, 0))
            connections.append(stack.enter_context(made))
    set_nodelay(*connections)
    return connections


@contextmanager
def containers(pod: LightPod) -> Iterator[tuple[Path, Path]]:
    """The sidecar's and the application's cgroup, which is limited."""
    (pod.folder / "cgroup.subtree_control").write_text("+memory")
    sidecar, app = pod.folder / "sidecar", pod.folder / "app"
    for folder in (sidecar, app):
        folder.mkdir()
    try:
        (app / "memory.max").write_text(str(LIMIT))
        yield sidecar, app
    finally:
        away_from_pods()
        for folder in (sidecar, app):
            remove_cgroup(folder)


def try_it(pod: LightPod, situation: Situation) -> Found:
    """One sidecar that says more than its application reads."""
    ours, theirs = multiprocessing.Pipe()
    with containers(pod) as (sidecar, app), ExitStack() as stack:
        (sidecar / "cgroup.procs").write_text("0")
        fork = multiprocessing.get_context("fork")
        receiver = fork.Process(target=rest, args=(app, situation, theirs), daemon=True)
        receiver.start()
        theirs.close()
        ours.recv()
        connections = connect(stack)
        greet(pod, connections)
        ours.recv()
        sent, errors = press(connections)
        charged = number(app, "memory.stat", "sock")
        stack.close()
        received, wrong, missing = 0, CONNECTIONS, 0
        with suppress(EOFError, BrokenPipeError):
            ours.send("read")
            received, wrong = ours.recv()
            missing = max(0, number(app, "memory.stat", "anon") - number(app, "memory.current"))
            ours.send("end")
        receiver.join()
        killed = number(app, "memory.events", "oom_kill")
    return Found(
        situation=situation.name,
        sent=sum(sent),
        received=received,
        wrong=wrong,
        charged=charged,
        missing=missing,
        bypassed=pod.total().bypassed_bytes,
        killed=killed,
        errors=sorted(set(errors)),
    )


@contextmanager
def disk() -> Iterator[None]:
    """A block device of LIMIT zeros, on tmpfs, whose cache the kernel can take back."""
    loop_set_fd, loop_clr_fd = 0x4C00, 0x4C01  # linux/loop.h
    backing = Path("/tmp/disk")
    with backing.open("w+b") as file, DISK.open("rb") as device:
        file.truncate(LIMIT)
        fcntl.ioctl(device, loop_set_fd, file.fileno())
        try:
            yield
        finally:
            fcntl.ioctl(device, loop_clr_fd)


def main() -> int:
    (cgroups.mount_point() / "cgroup.subtree_control").write_text("+memory")
    programs = Programs(LIMITS)
    found = []
    with disk():
        for situation in SITUATIONS:
            with accelerated(programs) as pod:
                found.append(asdict(try_it(pod, situation)))
    json.dump(found, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
