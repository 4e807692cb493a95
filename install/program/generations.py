# SPDX-License-Identifier: Apache-2.0
"""The bpffs folder: one generation of pinned programs and maps per load, one of them current.

A load makes a new generation and swaps the symlink ``current`` over to it, so that the plugin
always finds a whole one. It takes the sockets of older generations out of their sockhash, and
their connections go on by TCP. The pins of an older one stay while a socket in it has unread
bypassed bytes, or a pod has its programs, so that `pause` and `unload` reach them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bpf import abi, bpfsys, pins
from bpf.loader import PINS, PINS_OF_ALL, Programs
from install.program import whole_file

_NAME = re.compile(r"gen-\d+")
_STAGED = "next"  # bpffs refuses names with a dot
_ONE = (1).to_bytes(4, sys.byteorder)
BPF_FS_MAGIC = 0xCAFE4A11  # linux/magic.h


def opened(pin: Path) -> AbstractContextManager[int]:
    """A pinned object's file descriptor, for as long as the context lasts."""
    return bpfsys.closing(bpfsys.obj_get(str(pin)))


def kept_open(stack: contextlib.ExitStack, pin: Path) -> int:
    """The same until the stack closes it; for good once the stack has let go (pop_all)."""
    fd = bpfsys.obj_get(str(pin))
    stack.callback(os.close, fd)
    return fd


def kept_visit(stack: contextlib.ExitStack, folder: Path) -> tuple[int, ...]:
    """A generation's program for visits to files. Behind it the one for sockets, where there is
    one: the first relies on it, and it goes with its last pin or file descriptor."""
    kept = [kept_open(stack, folder / pins.VISIT)]
    with contextlib.suppress(FileNotFoundError):
        kept.append(kept_open(stack, folder / pins.VISIT_SOCKET))
    return tuple(kept)


@dataclass(frozen=True)
class Generation:
    """One set of pins, `gen-<N>`."""

    folder: Path

    @property
    def number(self) -> int:
        return int(self.folder.name.rpartition("-")[2])

    def is_whole(self) -> bool:
        """Whether every pin of this version's is in place."""
        return all((self.folder / pin).exists() for pin in PINS)

    def sock_ops_id(self) -> int:
        """The kernel's ID of the pinned sock_ops program."""
        with opened(self.folder / pins.SOCK_OPS) as fd:
            return bpfsys.prog_info(fd).id

    def flags(self) -> int:
        """The control flags, abi.CONTROL_*."""
        with opened(self.folder / pins.CONTROL) as fd:
            raw = bpfsys.map_lookup(fd, bytes(4), ctypes.sizeof(abi.Control))
        return int(abi.Control.from_buffer_copy(raw).flags)

    def is_retired(self) -> bool:
        """Whether every visit takes its sockets out of the sockhash."""
        return bool(self.flags() & abi.CONTROL_LEAVE)

    def joiner_silent_s(self) -> float | None:
        """How long ago a joiner has last told the programs that it runs; None when none has."""
        with opened(self.folder / pins.BEAT) as fd:
            beat = int.from_bytes(bpfsys.map_lookup(fd, bytes(4), 8), sys.byteorder)
        return (time.monotonic_ns() - beat) / 1e9 if beat else None

    def has_pinned(self, pin: str, map_fd: int) -> bool:
        """Whether this very map is what is pinned here; a later load may use the same folder."""
        try:
            with opened(self.folder / pin) as fd:
                return bpfsys.map_info(fd).id == bpfsys.map_info(map_fd).id
        except OSError:
            return False

    def set_flags(self, flags: int) -> None:
        with opened(self.folder / pins.CONTROL) as fd:
            bpfsys.map_update(fd, bytes(4), bytes(abi.Control(flags, 0)))

    def set_paused(self, paused: bool, *, is_trial: bool = False) -> None:
        """Whether all bytes of this generation's connections go by TCP; `is_trial`: for now."""
        pause = abi.CONTROL_PAUSED | (abi.CONTROL_TRIAL if is_trial else 0)
        others = self.flags() & ~(abi.CONTROL_PAUSED | abi.CONTROL_TRIAL)
        self.set_flags(others | (pause if paused else 0))

    def set_retired(self, retired: bool) -> None:
        """Whether every visit takes its sockets out of the sockhash."""
        others = self.flags() & ~abi.CONTROL_LEAVE
        self.set_flags(others | (abi.CONTROL_LEAVE if retired else 0))

    def paused_pods(self) -> set[int]:
        """The IDs of the pods all of whose bytes go by TCP."""
        with opened(self.folder / pins.PAUSED_PODS) as fd:
            return {int.from_bytes(key, sys.byteorder) for key in bpfsys.map_keys(fd, 8)}

    def set_paused_pods(self, pod_ids: set[int]) -> None:
        """Pauses these pods and no others; the programs look them up only if there are any."""
        before = self.paused_pods()
        with opened(self.folder / pins.PAUSED_PODS) as fd:
            for pod_id in pod_ids - before:
                bpfsys.map_update(fd, pod_id.to_bytes(8, sys.byteorder), _ONE)
            others = self.flags() & ~abi.CONTROL_PODS_PAUSED
            self.set_flags(others | (abi.CONTROL_PODS_PAUSED if pod_ids else 0))
            for pod_id in before - pod_ids:
                bpfsys.map_delete(fd, pod_id.to_bytes(8, sys.byteorder))

    def traces(self) -> list[str]:
        """The pins of its programs on functions of the kernel; its sockets rely on them."""
        return [pin for pin in pins.TRACES if (self.folder / pin).exists()]

    def is_mended(self) -> bool:
        """Whether FIONREAD of its sockets is mended: the links are pinned."""
        return set(pins.MENDS) <= set(self.traces())

    def refuses_splice(self) -> bool:
        """Whether its sockets refuse to be spliced from: the link is pinned, and its notes."""
        return pins.SPLICE_REFUSAL in self.traces() and (self.folder / pins.SPLICERS).exists()

    def lost_answers(self) -> int:
        """How many answers to FIONREAD the mend could not write."""
        with opened(self.folder / pins.FIONREAD) as fd:
            raw = bpfsys.map_lookup(fd, bytes(4), ctypes.sizeof(abi.Fionread))
        return int(abi.Fionread.from_buffer_copy(raw).lost)

    def has_sockets(self) -> bool:
        """Whether any socket is still in this generation's sockhash."""
        with opened(self.folder / pins.SOCKHASH) as fd:
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
        found = [Generation(p) for p in self.root.glob("gen-*") if _NAME.fullmatch(p.name)]
        return sorted(found, key=lambda generation: generation.number)

    def complete(self) -> list[Generation]:
        """Those with every pin in place that all versions have."""
        return [g for g in self.all() if all((g.folder / pin).exists() for pin in PINS_OF_ALL)]

    def program_ids(self) -> set[int]:
        """The IDs of their sock_ops programs: what is ours on a cgroup."""
        found = set()
        for generation in self.all():
            with contextlib.suppress(FileNotFoundError):  # a load has just removed it, or a part
                found.add(generation.sock_ops_id())
        return found

    def current(self) -> Generation | None:
        """What the link names, whether or not it is there."""
        link = self.root / pins.CURRENT
        with contextlib.suppress(FileNotFoundError):  # an unload has just removed it
            return Generation(self.root / link.readlink()) if link.is_symlink() else None
        return None

    def publish(self, programs: Programs) -> Generation:
        """Pins the programs as the newest generation and makes it the current one."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        before = self.current()
        number = max((generation.number for generation in self.all()), default=0) + 1
        generation = Generation(self.root / f"gen-{number}")
        try:
            programs.pin(generation.folder, bpfsys.obj_pin)
            if before in self.complete():  # else somebody has removed it, or a part of it
                generation.set_flags(before.flags() & ~abi.CONTROL_LEAVE)
                generation.set_paused_pods(before.paused_pods())
            current, target = self.root / pins.CURRENT, Path(generation.folder.name)
            whole_file.link(current, target, staged=self.root / _STAGED)
        except BaseException:
            shutil.rmtree(generation.folder, ignore_errors=True)
            raise
        return generation

    def withdraw(self) -> None:
        """No current generation any more: from here on ADD passes pods through."""
        (self.root / pins.CURRENT).unlink(missing_ok=True)

    def remove_idle(self, attached: set[int]) -> None:
        """Removes old generations without sockets, and incomplete ones.

        `attached` are the IDs of programs that pods still have: their generation stays, too.
        """
        current, complete = self.current(), self.complete()
        for generation in self.all():
            in_use = generation in complete and (
                generation.sock_ops_id() in attached or generation.has_sockets()
            )
            if generation != current and not in_use:
                generation.remove()

    def remove_all(self) -> None:
        """Unpins everything of ours. The folder stays if it holds other files.

        A generation with programs on functions of the kernel stays as long as sockets are in its
        sockhash.
        """
        self.withdraw()
        complete = self.complete()
        for generation in self.all():
            is_needed = generation in complete and generation.traces()
            if not (is_needed and generation.has_sockets()):
                generation.remove()
        (self.root / _STAGED).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
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
