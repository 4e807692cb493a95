# SPDX-License-Identifier: Apache-2.0
"""Whether the mend of FIONREAD works, asked of two sockets of the joiner's own.

A generation whose sockets need it must not go on without. Its links are pinned, but a pin can be
removed, a bpffs unmounted, and `kernel.ftrace_enabled=0` silences all such programs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
from dataclasses import dataclass

from bpf import abi, bpfsys, pins
from install.program import log
from install.program.generations import Generation, Generations
from install.program.probes import unread_bytes

LOOK_S = 1.0  # between two looks
_FAMILIES = (socket.AF_INET, socket.AF_INET6)  # one for each program


def _sockets(conns: int) -> list[socket.socket]:
    """Sockets that the mend answers as it answers no other."""
    size = bpfsys.map_info(conns).value_size
    marked = abi.CANARY.to_bytes(8, sys.byteorder).ljust(size, b"\0")
    made = []
    for family in _FAMILIES:
        with contextlib.suppress(OSError):  # the kernel may be without IPv6
            made.append(socket.socket(family))
    for each in made:
        bpfsys.map_update(conns, each.fileno().to_bytes(4, sys.byteorder), marked)
    return made


@dataclass
class Canary:
    """One generation's. What it opens outlives the pins."""

    generation: Generation
    programs_id: int  # of its sock_ops program: what is its own on a cgroup
    _links: list[int]
    _control: int
    _sockhash: int
    _sockets: list[socket.socket]
    is_well: bool = True

    @staticmethod
    def of(generation: Generation) -> Canary | None:
        """None when the generation does without the mend."""
        if not generation.is_mended():
            return None
        wanted = (*pins.MENDS, pins.CONTROL, pins.SOCKHASH)
        *links, control, sockhash = [bpfsys.obj_get(str(generation.folder / pin)) for pin in wanted]
        with bpfsys.closing(bpfsys.obj_get(str(generation.folder / pins.CONNS))) as conns:
            sockets = _sockets(conns)
        return Canary(generation, generation.sock_ops_id(), links, control, sockhash, sockets)

    def look(self) -> None:
        """Sends the sockets back to TCP when FIONREAD is wrong, and lets them join once it is right
        again."""
        is_pinned, why = self.generation.is_mended(), self.why_not_mended()
        is_well = not why
        if is_well == self.is_well or not (is_pinned or self.has_sockets()):
            return  # the second: it is just being removed
        self.is_well = is_well
        self._retire(not is_well)
        name = self.generation.folder.name
        if is_well:
            log.info("mend_recovered", f"FIONREAD is mended again in {name}", generation=name)
        else:
            said = f"FIONREAD is mended no more in {name}: {why}; its sockets go back to TCP"
            log.error("mend_lost", said, generation=name)

    def why_not_mended(self) -> str:
        """Why FIONREAD is mended no more, tried now; empty when it is."""
        if not self.generation.is_mended():
            return "its pins are gone"
        answers = {unread_bytes(each) for each in self._sockets}
        return "" if answers == {abi.CANARY_ANSWER} else "it does not answer any more"

    def has_sockets(self) -> bool:
        """Whether any are in the sockhash, with or without its pin."""
        return not bpfsys.map_is_empty(self._sockhash)

    def _retire(self, retired: bool) -> None:
        """As Generation.retire() does through the pin. One that is not current stays retired."""
        current = Generations(self.generation.folder.parent).current()
        if not retired and current != self.generation:
            return
        raw = bpfsys.map_lookup(self._control, bytes(4), ctypes.sizeof(abi.Control))
        flags = abi.Control.from_buffer_copy(raw).flags & ~abi.CONTROL_LEAVE
        control = abi.Control(flags | (abi.CONTROL_LEAVE if retired else 0), 0)
        bpfsys.map_update(self._control, bytes(4), bytes(control))

    def close(self) -> None:
        for fd in (*self._links, self._control, self._sockhash):
            os.close(fd)
        for each in self._sockets:
            each.close()


def why_not_mended(generation: Generation) -> str:
    """As the joiner would find it, without a joiner. Raises OSError."""
    canary = Canary.of(generation)
    if canary is None:
        return "its pins are gone"
    try:
        return canary.why_not_mended()
    finally:
        canary.close()
