# SPDX-License-Identifier: Apache-2.0
"""Suite: how long FIONREAD stays mended, and what becomes of sockets when it no longer is.

A connection of a pod joins by the real joiner. Then the joiner is killed, tracing is silenced
(`kernel.ftrace_enabled`) and switched on again, the pins are removed, and the whole bpffs is
unmounted. Another lives through an upgrade, and one of its successor's through a pause and an
unload, after which all is gone. Their readers ask all the time how much is unread.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bpf import abi, bpfsys, pins
from bpf.loader import Programs
from install.program import commands, leaving
from install.program.generations import Generations
from install.program.node import Node
from install.program.probes import connected, enter, unread_bytes
from tests.bed.bpf_objects import LINKS, count_ids
from tests.light import LIMITS, LightPod, accelerated

BPFFS = Path("/sys/fs/bpf/life")
STATE = Path("/run/life")
NODE = Node(BPFFS, STATE)
SYSCTL = Path("/proc/sys/kernel/ftrace_enabled")
PATIENCE_S = 60.0
# Of an emulated CPU it needs more than a fiftieth.
JOINER = (
    "import sys; from install.program import cli, joiner; joiner.SHARE = 0.5; sys.exit(cli.main())"
)
_Fork = multiprocessing.get_context("fork")


def reader(pod: LightPod, line: Connection) -> None:
    """Answers: "exchange" makes one; "unread" sends 700 bytes by TCP, asks and reads them."""
    enter(pod.folder)
    with connected(greet=False) as (client, server):
        line.send("connected")
        while (told := line.recv()) != "end":
            client.sendall(b"x" * (700 if told == "unread" else 1))
            deadline = time.monotonic() + 1
            while (found := unread_bytes(server)) == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            while len(server.recv(700, socket.MSG_PEEK)) < (700 if told == "unread" else 1):
                time.sleep(0.01)
            server.recv(700)
            server.sendall(b"y")
            client.recv(1)
            line.send(found)


def until(what: Callable[[], object], patience_s: float = PATIENCE_S) -> float:
    """How long it took; that much and no more when it did not come."""
    start = time.monotonic()
    while not what() and time.monotonic() < start + patience_s:
        time.sleep(0.05)
    return round(time.monotonic() - start, 1)


class Life:
    """The node, its one pod, and the pod's connection."""

    def __init__(self, pod: LightPod, line: Connection) -> None:
        self._pod, self._line = pod, line
        self.joiner = self.start_joiner()

    def start_joiner(self) -> subprocess.Popen[bytes]:
        options = ["--bpffs", str(BPFFS), "--state-dir", str(STATE)]
        return subprocess.Popen([sys.executable, "-c", JOINER, "join", *options])

    def ask(self, what: str) -> int:
        self._line.send(what)
        return int(self._line.recv())

    def unread_by_tcp(self) -> int:
        """What FIONREAD says of 700 bytes that came by TCP, as when the bypass is paused."""
        flags = self.flags()
        self._pod.control(flags | abi.CONTROL_PAUSED)
        found = self.ask("unread")
        self._pod.control(self.flags() & ~abi.CONTROL_PAUSED)
        return found

    def flags(self) -> int:
        raw = bpfsys.map_lookup(self._pod.programs.fds[pins.CONTROL], bytes(4), 8)
        return int(abi.Control.from_buffer_copy(raw).flags)

    def leaves(self) -> bool:
        return bool(self.flags() & abi.CONTROL_LEAVE)

    def join(self) -> float:
        """How long it took. Raises TimeoutError."""

        def has_joined() -> bool:
            for _ in range(20):
                self.ask("exchange")
            return self._pod.members() == 2

        seconds = until(has_joined)
        if self._pod.members() != 2:
            raise TimeoutError(f"{self._pod.total()}, flags {self.flags()}")
        return seconds

    @contextmanager
    def reconnected(self) -> Iterator[None]:
        """Another connection in place of the first, which began under an older generation."""
        first = self._line
        with connection(self._pod) as self._line:
            yield
        self._line = first

    def lose(self, how: Callable[[], object]) -> dict[str, Any]:
        """How soon it is noticed, how soon all have left, and FIONREAD from then on."""

        def have_left() -> bool:
            self.ask("exchange")
            return self._pod.members() == 0

        how()
        noticed, left = until(self.leaves), until(have_left)
        return {"noticed_s": noticed, "left_s": left, "then": self.unread_by_tcp()}

    def upgrade(self) -> dict[str, Any]:
        """A second generation, as `load` makes it, while the connection is a member of the first:
        which generations are left then, and FIONREAD of the connection."""
        newer, members = mended(), self._pod.members()
        generations = Generations(BPFFS)
        leaving.empty_all(generations.complete(), [self._pod.folder])
        published(newer)
        self._pod.reload(newer)
        current = generations.current()
        assert current is not None
        generations.remove_idle({current.sock_ops_id()})
        left = [each.folder.name for each in generations.all()]
        return {"members": members, "generations": left, "then": self.ask("unread")}

    def unload(self, links_before: int) -> dict[str, Any]:
        """What is left of a member and its generation, and FIONREAD from then on."""
        members, sockhash = self._pod.members(), self._pod.programs.fds[pins.SOCKHASH]
        commands.unload(NODE)
        # The joiner's canary holds them, until it looks.
        until(lambda: count_ids(LINKS) == links_before)
        return {
            "members": members,
            "is_sockhash_empty": bpfsys.map_is_empty(sockhash),
            "pins": sorted(map(str, BPFFS.rglob("*"))),
            "links": count_ids(LINKS) - links_before,
            "then": self.ask("unread"),
        }


def mended() -> Programs:
    """Raises SystemExit where FIONREAD cannot be mended."""
    programs = Programs(LIMITS)
    if why_not := programs.mend_fionread():
        raise SystemExit(why_not)
    return programs


def published(programs: Programs) -> None:
    """As the current generation; its pins alone hold the links, as when `load` has ended."""
    Generations(BPFFS).publish(programs)
    for pin in programs.fds.keys() & set(pins.TRACES):
        os.close(programs.fds.pop(pin))


@contextmanager
def connection(pod: LightPod) -> Iterator[Connection]:
    """A process in the pod with one connection, which does what reader() is told."""
    ours, theirs = _Fork.Pipe()
    child = _Fork.Process(target=reader, args=(pod, theirs))
    child.start()
    ours.recv()
    try:
        yield ours
    finally:
        ours.send("end")
        child.join()


@contextmanager
def alive() -> Iterator[Life]:
    programs = mended()
    published(programs)
    STATE.mkdir(exist_ok=True)
    with accelerated(programs, passes=False) as pod, connection(pod) as line:
        life = Life(pod, line)
        try:
            yield life
        finally:
            life.joiner.terminate()
            life.joiner.wait()
    shutil.rmtree(BPFFS, ignore_errors=True)


def end_as_operators_do(life: Life, links_before: int) -> dict[str, Any]:
    """A member's FIONREAD through an upgrade, a pause and an unload."""
    found: dict[str, Any] = {}
    life.join()
    found["upgraded"] = life.upgrade()
    with life.reconnected():
        life.join()
        found["member of the second"] = life.unread_by_tcp()
        commands.pause(NODE)
        found["paused"] = life.ask("unread")
        commands.resume(NODE)
        life.join()
        found["resumed"] = life.unread_by_tcp()
        found["unloaded"] = life.unload(links_before)
    return found


def main() -> int:
    found: dict[str, Any] = {}
    links_before = count_ids(LINKS)
    with alive() as life:
        found["joined_s"] = life.join()
        found["member"] = life.unread_by_tcp()
        life.joiner.kill()
        life.joiner.wait()
        found["joiner killed"] = life.unread_by_tcp()
        life.joiner = life.start_joiner()
        time.sleep(3)
        found["silenced"] = life.lose(lambda: SYSCTL.write_text("0"))
        SYSCTL.write_text("1")
        found["recovered_s"] = until(lambda: not life.leaves())
        found["joined_again_s"] = life.join()
        found["member again"] = life.unread_by_tcp()
        found["unpinned"] = life.lose((BPFFS / "gen-1" / pins.MENDS[0]).unlink)
    with alive() as life:
        found |= end_as_operators_do(life, links_before)
    with alive() as life:
        life.join()
        time.sleep(3)
        found["unmounted"] = life.lose(lambda: os.system("umount -l /sys/fs/bpf"))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
