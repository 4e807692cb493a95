# SPDX-License-Identifier: Apache-2.0
"""What a generation of programs tells its joiner, and the joiner it: due pods, and a sign of life.

A pod's entry in the map `due` says what its connections have missed, and what a pass costs. A ring
buffer wakes the joiner.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import os
import sys
import time
from dataclasses import dataclass

from bpf import abi, bpfsys, pins
from install.program.canary import Canary
from install.program.generations import Generation, kept_open, kept_visit, opened

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Bell:
    """The ring buffer in which programs say that a pass is due. Read through libbpf."""

    def __init__(self, map_fd: int) -> None:
        self._lib = ctypes.CDLL(ctypes.util.find_library("bpf") or "libbpf.so.1")
        self._lib.ring_buffer__new.restype = ctypes.c_void_p
        self._lib.ring_buffer__new.argtypes = [
            *(ctypes.c_int, _CALLBACK, ctypes.c_void_p, ctypes.c_void_p)
        ]
        for name in ("ring_buffer__consume", "ring_buffer__epoll_fd", "ring_buffer__free"):
            getattr(self._lib, name).argtypes = [ctypes.c_void_p]
        self._callback = _CALLBACK(self._hear)
        self._has_edge = False
        self._ring = self._lib.ring_buffer__new(map_fd, self._callback, None, None)
        if not self._ring:
            raise OSError("libbpf could not open the ring buffer")
        self.fd: int = self._lib.ring_buffer__epoll_fd(self._ring)

    def _hear(self, _context: int, data: int, _size: int) -> int:
        self._has_edge |= bool(ctypes.c_uint32.from_address(data).value)
        return 0  # `due` has the rest

    def take_edge(self) -> bool:
        """Whether an edge has been asked for since the last call."""
        taken, self._has_edge = self._has_edge, False
        return taken

    def drain(self) -> None:
        self._lib.ring_buffer__consume(self._ring)

    def close(self) -> None:
        self._lib.ring_buffer__free(self._ring)


@dataclass
class Served:
    """A generation that the joiner serves."""

    generation: Generation
    visits: tuple[int, ...]  # kept_visit()
    due: int
    beat: int
    bell: Bell
    canary: Canary | None

    @staticmethod
    def of(generation: Generation) -> Served:
        with contextlib.ExitStack() as stack:
            visits = kept_visit(stack, generation.folder)
            due = kept_open(stack, generation.folder / pins.DUE)
            beat = kept_open(stack, generation.folder / pins.BEAT)
            with opened(generation.folder / pins.BELL) as ring:
                bell = Bell(ring)
            stack.callback(bell.close)
            canary = Canary.of(generation)
            stack.pop_all()
        return Served(generation, visits, due, beat, bell, canary)

    def show_life(self) -> None:
        """Tells the programs that there is a joiner; else all goes by TCP after 5 s."""
        now = time.monotonic_ns().to_bytes(8, sys.byteorder)
        bpfsys.map_update(self.beat, bytes(4), now)

    @property
    def is_well(self) -> bool:
        """Whether its sockets may stay; not when FIONREAD has become wrong for them."""
        return self.canary is None or self.canary.is_well

    def is_pinned(self) -> bool:
        """Not when it was unpinned; a load may have given its folder to another one since."""
        return self.generation.has_pinned(pins.DUE, self.due)

    def is_needed(self) -> bool:
        """Whether it is to be served even without its pins: sockets must leave."""
        return self.canary is not None and self.canary.has_sockets()

    def has_sockets(self) -> bool:
        try:
            return (self.canary or self.generation).has_sockets()
        except FileNotFoundError:  # a load has just removed it: it had none
            return False

    def pods(self) -> list[int]:
        """All that have an entry, pending or not."""
        return [int.from_bytes(key, sys.byteorder) for key in bpfsys.map_keys(self.due, 8)]

    def pending(self) -> dict[int, abi.Due]:
        """Returns the entries of the pods whose pass is due, by pod ID."""
        found = {}
        for key in bpfsys.map_keys(self.due, 8):
            with contextlib.suppress(FileNotFoundError):
                raw = bpfsys.map_lookup(self.due, key, ctypes.sizeof(abi.Due))
                due = abi.Due.from_buffer_copy(raw)
                if due.pending:
                    found[int.from_bytes(key, sys.byteorder)] = due
        return found

    def begin(self, pod_id: int, cost: int, pending: int = 0) -> None:
        """Nothing missed: before a pass, so that what comes meanwhile counts.

        pending: one that did not come is due again, and may have been for an edge.
        """
        key = pod_id.to_bytes(8, sys.byteorder)
        bpfsys.map_update(self.due, key, bytes(abi.Due(0, cost, pending, edge=pending)))

    def forget(self, pod_id: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            bpfsys.map_delete(self.due, pod_id.to_bytes(8, sys.byteorder))

    def close(self) -> None:
        self.bell.close()
        if self.canary:
            self.canary.close()
        for fd in (*self.visits, self.due, self.beat):
            os.close(fd)
