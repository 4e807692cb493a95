"""The bpffs folder: one generation of pinned programs and maps per load, one of them current.

A load makes a new generation and swaps the symlink ``current`` over to it, so that the plugin
always finds a whole one. Connections that were set up under an older generation keep its
programs alive and stay on the bypass until they close; its pins stay as long, so that `pause`
and `unload` reach them.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bpf import abi
from bpf.loader import PINS, Programs
from cni_plugin import bpfsys, names

BPF_FS_MAGIC = 0xCAFE4A11  # linux/magic.h


def opened(pin: Path) -> AbstractContextManager[int]:
    """A pinned object's file descriptor, for as long as the context lasts."""
    return bpfsys.closing(bpfsys.obj_get(str(pin)))


@dataclass(frozen=True)
class Generation:
    """One set of pins, `gen-<N>`."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name.rpartition("-")[2])

    def sock_ops_id(self) -> int:
        """The kernel's ID of the pinned sock_ops program."""
        with opened(self.folder / names.SOCK_OPS) as fd:
            return bpfsys.prog_info(fd).id

    def flags(self) -> int:
        """The control flags, abi.CONTROL_*."""
        with opened(self.folder / names.CONTROL) as fd:
            raw = bpfsys.map_lookup(fd, bytes(4), ctypes.sizeof(abi.Control))
        return int(abi.Control.from_buffer_copy(raw).flags)

    def set_flags(self, flags: int) -> None:
        with opened(self.folder / names.CONTROL) as fd:
            bpfsys.map_update(fd, bytes(4), bytes(abi.Control(flags, 0)))

    def has_sockets(self) -> bool:
        """Whether any open connection still lives in this generation's sockhash."""
        with opened(self.folder / names.SOCKHASH) as fd:
            return not bpfsys.map_is_empty(fd)

    def remove(self) -> None:
        """Unpins everything of it. Open connections keep what they need, and no more."""
        shutil.rmtree(self.folder)


class Generations:
    """All generations below one bpffs folder."""

    def __init__(self, bpffs: Path) -> None:
        self.root = bpffs

    def all(self) -> list[Generation]:
        """Oldest first; also those that a killed load left incomplete."""
        found = [Generation(path) for path in self.root.glob("gen-*")]
        return sorted(found, key=lambda generation: generation.number)

    def complete(self) -> list[Generation]:
        """Those with every pin in place."""
        return [g for g in self.all() if all((g.folder / pin).exists() for pin in PINS)]

    def current(self) -> Generation | None:
        link = self.root / names.CURRENT
        return Generation(self.root / link.readlink()) if link.is_symlink() else None

    def publish(self, programs: Programs) -> Generation:
        """Pins the programs as the newest generation and makes it the current one."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = self.current()
        number = max((generation.number for generation in self.all()), default=0) + 1
        generation = Generation(self.root / f"gen-{number}")
        programs.pin(generation.folder, bpfsys.obj_pin)
        if before:
            generation.set_flags(before.flags())
        staged = self.root / "next"  # bpffs refuses names with a dot
        staged.unlink(missing_ok=True)
        staged.symlink_to(generation.folder.name)
        staged.rename(self.root / names.CURRENT)
        return generation

    def withdraw(self) -> None:
        """No current generation any more: from here on ADD passes pods through."""
        (self.root / names.CURRENT).unlink(missing_ok=True)

    def remove_idle(self) -> list[Generation]:
        """Removes old generations without connections, and incomplete ones."""
        current, complete = self.current(), self.complete()
        removed = []
        for generation in self.all():
            idle = generation not in complete or not generation.has_sockets()
            if generation != current and idle:
                generation.remove()
                removed.append(generation)
        return removed

    def remove_all(self) -> None:
        self.withdraw()
        for generation in self.all():
            generation.remove()
        if self.root.exists():
            self.root.rmdir()


def is_bpffs(folder: Path) -> bool:
    """Whether the folder, or the nearest parent that exists, is on a bpffs."""
    while not folder.exists():
        folder = folder.parent
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_long * 64)()
    if libc.statfs(os.fsencode(folder), buffer):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))
    return buffer[0] & 0xFFFFFFFF == BPF_FS_MAGIC
