# SPDX-License-Identifier: Apache-2.0
"""The smallest accelerated setting: one cgroup, loopback, no pod, no plugin, no bridge.

A process that has joined the cgroup connects from 127.0.0.6 to 127.0.0.1 as Envoy does to its
application, and is bypassed. Runs wherever the programs load, also in a bare virtual machine.
"""

from __future__ import annotations

import functools
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

from bpf import abi, bpfsys, loader, pins, stats
from bpf.loader import Limits, Programs
from cni_plugin import cgroup, names
from install.program.passes import repeated, visit_pod

CLIENT_IP = "127.0.0.6"
SERVER_IP = "127.0.0.1"
# With these limits the two ends find each other and may join within so many exchanges.
ACQUAINTANCE = 16
LIMITS = Limits(sockets=16_384, pending=8_192, counters=1_024, segments=1, exchanges=4, age_ms=0)
PASSES_S = 0.003  # between two passes
PATIENCE_S = 10.0

_numbers = itertools.count(1)


class LightPod:
    """An accelerated cgroup. Its pod's id is as good as any that ADD would draw."""

    def __init__(self, folder: Path, programs: Programs) -> None:
        self.folder = folder
        self.programs = programs
        self.id = os.getpid() << 16 | next(_numbers)
        self.attach()

    def attach(self) -> None:
        pod = abi.Pod(id=self.id, proxy_uid=names.PROXY_UID)
        pod.ip_count = 1
        pod.ip[0].word[3] = self.id & 0xFFFFFFFF
        key = abi.CgroupStorageKey(self.folder.stat().st_ino, bpfsys.CGROUP_SOCK_OPS, 0)
        with bpfsys.closing(os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)) as folder:
            bpfsys.prog_attach(self.programs.fds["tb_sock_ops"], folder)
        bpfsys.map_update(self.programs.fds[pins.PODS], bytes(key), bytes(pod))

    def detach(self) -> None:
        """New connections are left alone; open ones stay as they are."""
        with bpfsys.closing(os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)) as folder:
            bpfsys.prog_detach(self.programs.fds["tb_sock_ops"], folder)

    def reload(self, programs: Programs) -> None:
        """New programs take over from the running ones, as `load` does on a node."""
        self.detach()
        self.programs = programs
        self.attach()

    def enter(self) -> None:
        """Puts the calling process into the pod."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def pause(self, paused: bool = True) -> None:
        """From the next message on every byte goes by TCP, or may go by bypass again."""
        self.control(abi.CONTROL_PAUSED if paused else 0)

    def control(self, flags: int) -> None:
        """Sets the switch of the running programs, abi.CONTROL_*."""
        control = bytes(abi.Control(flags, 0))
        bpfsys.map_update(self.programs.fds[pins.CONTROL], bytes(4), control)

    def visit(self) -> None:
        """One pass over its processes."""
        visit_pod(self.programs.fds[loader.VISIT], self.folder)

    def members(self) -> int:
        """How many of its sockets have joined and not left; those that have closed count still."""
        total = self.total()
        return total.joined - total.left

    def until_joined(self, sockets: int = 2) -> None:
        """Waits until so many are in the sockhash. Raises TimeoutError."""
        deadline = time.monotonic() + PATIENCE_S
        while self.members() < sockets:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.members()} of {sockets} sockets have joined")
            time.sleep(0.001)

    def counters(self) -> dict[str, stats.HopCounters]:
        """What the running programs have counted for this pod, by hop."""
        lookup = functools.partial(bpfsys.map_lookup, self.programs.fds[pins.COUNTERS])
        return stats.pod_counters(self.id, lookup)

    def total(self) -> stats.HopCounters:
        """The counters of all hops together."""
        return sum(self.counters().values(), stats.HopCounters())


@contextmanager
def source_edited(edit: Callable[[str], str]) -> Iterator[None]:
    """Programs made meanwhile are as if their source were edited; nothing on disk changes."""
    text = edit(loader.source_text())
    with mock.patch.object(loader, "source_text", return_value=text):
        yield


def edited(edit: Callable[[str], str], **arguments: Any) -> Programs:
    """The programs as they would be with their source edited."""
    with source_edited(edit):
        return Programs(**arguments)


def set_nodelay(*sockets: socket.socket) -> None:
    """One end must have TCP_NODELAY, or none joins. What a listener accepts has it from there."""
    for each in sockets:
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def away_from_pods() -> None:
    """Puts the calling process into the root cgroup, out of every pod."""
    (_mount() / "cgroup.procs").write_text(str(os.getpid()))


def _mount() -> Path:
    mount = cgroup.find_mount()
    if mount is None:
        raise RuntimeError("no cgroup2 file system is mounted")
    return mount


def remove_cgroup(folder: Path) -> None:
    """Removes a cgroup whose processes have ended, or are about to."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return folder.rmdir()
        except OSError:  # EBUSY: a process is still on its way out
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def accelerated(programs: Programs | None = None, *, passes: bool = True) -> Iterator[LightPod]:
    """An accelerated cgroup, removed on leaving; its processes must have ended by then.

    Its sockets join as soon as they have made one exchange: passes go on all the time meanwhile,
    unless the caller means to make them.
    """
    if programs is None:
        with closing(Programs(LIMITS)) as made, accelerated(made, passes=passes) as pod:
            yield pod
        return
    folder = _mount() / f"tb-light-{os.getpid()}-{next(_numbers)}"
    folder.mkdir()
    try:
        pod = LightPod(folder, programs)
        try:
            # BlockingIOError: the test makes a pass by itself.
            with repeated(pod.visit, PASSES_S, BlockingIOError) if passes else nullcontext():
                yield pod
        finally:
            with suppress(FileNotFoundError):  # the test has unloaded
                pod.detach()
    finally:
        remove_cgroup(folder)
