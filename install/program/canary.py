# SPDX-License-Identifier: Apache-2.0
"""Whether the programs on functions of the kernel run, asked of two sockets of the joiner's own.

They mend FIONREAD and refuse splice(2). A generation whose sockets need them must not go on
without. Their links are pinned, but a pin can be removed, a bpffs unmounted, and
`kernel.ftrace_enabled=0` silences all of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import sys
from dataclasses import dataclass

from bpf import abi, bpfsys, pins
from cni_plugin.state import State
from install.program import log
from install.program.generations import Generation, Generations, kept_open
from install.program.lookups import SO_COOKIE
from install.program.probes import unread_bytes

LOOK_S = 1.0  # between two looks
LOCK_PATIENCE_S = 0.1
_FAMILIES = (socket.AF_INET, socket.AF_INET6)  # one for each program


def _sockets() -> list[socket.socket]:
    made = []
    for family in _FAMILIES:
        with contextlib.suppress(OSError):  # the kernel may be without IPv6
            made.append(socket.socket(family))
    return made


def _mark(conns: int, canary: socket.socket) -> None:
    """From now on the mend treats it as no other socket."""
    size = bpfsys.map_info(conns).value_size
    marked = abi.CANARY.to_bytes(8, sys.byteorder).ljust(size, b"\0")
    bpfsys.map_update(conns, canary.fileno().to_bytes(4, sys.byteorder), marked)


def _try_splice(splicers: int, canary: socket.socket) -> bool:
    """Calls splice(2); returns whether the program that refuses it has seen the call."""
    cookie = canary.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
    with contextlib.suppress(FileNotFoundError):
        bpfsys.map_delete(splicers, cookie)
    splice(canary)
    with contextlib.suppress(FileNotFoundError):
        return bool(bpfsys.map_lookup(splicers, cookie, 4))
    return False


def splice(canary: socket.socket) -> None:
    """As an application would; no byte comes, since it is not connected."""
    ends = os.pipe()
    try:
        with contextlib.suppress(OSError):
            os.splice(canary.fileno(), ends[1], 1)
    finally:
        for end in ends:
            os.close(end)


@dataclass
class Canary:
    """One generation's. What it opens outlives the pins."""

    generation: Generation
    programs_id: int  # of its sock_ops program: what is its own on a cgroup
    traces: dict[str, int]  # links, by their pins
    _control: int
    _sockhash: int
    _splicers: int | None
    _sockets: list[socket.socket]
    is_well: bool = True
    _failed: str = ""  # at the last look

    @staticmethod
    def of(generation: Generation) -> Canary | None:
        """None when the generation has no programs on functions of the kernel."""
        traces = generation.traces()
        if not traces:
            return None
        with contextlib.ExitStack() as stack:
            kept = functools.partial(kept_open, stack)
            traced = {pin: kept(generation.folder / pin) for pin in traces}
            control = kept(generation.folder / pins.CONTROL)
            sockhash = kept(generation.folder / pins.SOCKHASH)
            refuses = generation.refuses_splice()
            splicers = kept(generation.folder / pins.SPLICERS) if refuses else None
            sockets = [stack.enter_context(each) for each in _sockets()]
            with bpfsys.closing(bpfsys.obj_get(str(generation.folder / pins.CONNS))) as conns:
                for each in sockets:
                    _mark(conns, each)
            number = generation.sock_ops_id()
            stack.pop_all()
        return Canary(generation, number, traced, control, sockhash, splicers, sockets)

    def look(self, state: State) -> None:
        """Sends the sockets back to TCP when a program does not run, and lets them join once it
        does again. ``state`` has the node's lock."""
        is_pinned, why = not self._missing(), self.try_programs()
        # The kernel leaves a program out while a thread that runs it is preempted on this CPU.
        is_well = not why or (is_pinned and not self._failed and self.is_well)
        self._failed = why
        if is_well == self.is_well or not (is_pinned or self.has_sockets()):
            return  # the second: it is just being removed
        self.is_well = is_well
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # somebody holds it for long: this is graver
                stack.enter_context(state.locked(LOCK_PATIENCE_S))
            self._set_retired(not is_well)
        name = self.generation.folder.name
        if is_well:
            log.info("mend_recovered", f"all programs of {name} run again", generation=name)
        else:
            said = f"{why} in {name}; its sockets go back to TCP"
            log.error("mend_lost", said, generation=name)

    def _missing(self) -> set[str]:
        if not self.generation.has_pinned(pins.SOCKHASH, self._sockhash):
            return set(self.traces)
        return self.traces.keys() - self.generation.traces()

    def try_programs(self) -> str:
        """Which program does not run, tried now; empty when all do."""
        if missing := self._missing():
            return f"pins are gone: {', '.join(sorted(missing))}"
        for each in self._sockets:
            if self.traces.keys() & {*pins.MENDS} and unread_bytes(each) != abi.CANARY_ANSWER:
                return "FIONREAD is mended no more"
            if self._splicers is not None and not _try_splice(self._splicers, each):
                return "splice(2) is refused no more"
        return ""

    def has_sockets(self) -> bool:
        """Whether any are in the sockhash, with or without its pin."""
        return not bpfsys.map_is_empty(self._sockhash)

    def _set_retired(self, retired: bool) -> None:
        """As Generation.set_retired(), without the pin. One that is not current stays retired."""
        current = Generations(self.generation.folder.parent).current()
        if not retired and current != self.generation:
            return
        raw = bpfsys.map_lookup(self._control, bytes(4), ctypes.sizeof(abi.Control))
        flags = abi.Control.from_buffer_copy(raw).flags & ~abi.CONTROL_LEAVE
        control = abi.Control(flags | (abi.CONTROL_LEAVE if retired else 0), 0)
        bpfsys.map_update(self._control, bytes(4), bytes(control))

    def close(self) -> None:
        splicers = () if self._splicers is None else (self._splicers,)
        for fd in (*self.traces.values(), self._control, self._sockhash, *splicers):
            os.close(fd)
        for each in self._sockets:
            each.close()


def try_programs(generation: Generation) -> str:
    """As the joiner would find it, without a joiner. Raises OSError."""
    canary = Canary.of(generation)
    if canary is None:
        return "pins are gone"
    try:
        return canary.try_programs()
    finally:
        canary.close()
