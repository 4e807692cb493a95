# SPDX-License-Identifier: Apache-2.0
"""BPF programs and maps that a run has loaded: named by their IDs, looked for after its end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bpf import bpfsys

PROGRAMS, MAPS, LINKS = 11, 12, 31  # BPF_*_GET_NEXT_ID, linux/bpf.h


@dataclass(frozen=True)
class BpfObject:
    """A program or a map in the kernel."""

    kind: Literal["program", "map"]
    id: int
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.id} ({self.name})"

    def exists(self) -> bool:
        """Whether the kernel still has it, pinned or not."""
        opened = bpfsys.prog_open if self.kind == "program" else bpfsys.map_open
        try:
            fd = opened(self.id)
        except FileNotFoundError:
            return False
        with bpfsys.closing(fd):
            return True


def pinned(bpffs: Path) -> set[BpfObject]:
    """The programs pinned below a folder and every map that they use."""
    found: set[BpfObject] = set()
    for pin in bpffs.rglob("*"):
        if pin.is_symlink() or not pin.is_file():
            continue
        with bpfsys.closing(bpfsys.obj_get(str(pin))) as fd:
            if "bpf-prog" not in Path(f"/proc/self/fd/{fd}").readlink().name:
                continue
            program = bpfsys.prog_info(fd)
        found.add(BpfObject("program", program.id, program.name))
        for map_id in program.map_ids:
            with bpfsys.closing(bpfsys.map_open(map_id)) as fd:
                found.add(BpfObject("map", map_id, bpfsys.map_info(fd).name))
    return found


def surviving(objects: Iterable[BpfObject], patience_s: float = 10) -> list[BpfObject]:
    """Those that the kernel still has; it frees them a grace period or two after the last use."""
    deadline = time.monotonic() + patience_s
    left = list(objects)
    while left and time.monotonic() < deadline:
        left = [found for found in left if found.exists()]
        time.sleep(0.02)
    return left


def count_ids(kind: int) -> int:
    """How many objects of PROGRAMS, MAPS or LINKS are in the kernel, ours or not."""
    count, attr = 0, bpfsys._attr("=III", 0, 0, 0)
    with contextlib.suppress(FileNotFoundError):
        while True:
            bpfsys._bpf(kind, attr)
            count += 1
            attr = bpfsys._attr("=III", int.from_bytes(attr.raw[4:8], sys.byteorder), 0, 0)
    return count
