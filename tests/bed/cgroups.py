# SPDX-License-Identifier: Apache-2.0
"""cgroup2 folders: found, made, measured, and removed with every process in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path


@cache
def mount_point() -> Path:
    """Where cgroup2 is mounted: /sys/fs/cgroup, or below it in the hybrid hierarchy.

    Raises:
        RuntimeError: it is mounted nowhere.
    """
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.split()[0] == "cgroup2":
            return Path(before.split()[4])
    raise RuntimeError("no cgroup2 file system in /proc/self/mountinfo; mount one")


@contextmanager
def made(folder: Path) -> Iterator[Path]:
    """A new cgroup; on leaving, its processes are killed and it is removed, children first."""
    try:
        folder.mkdir(parents=True)
        yield folder
    finally:
        remove(folder)


def kill(folder: Path) -> None:
    """SIGKILL every process in a cgroup and its children; they may live for an instant more."""
    with suppress(FileNotFoundError):
        (folder / "cgroup.kill").write_text("1")


def remove(folder: Path, patience_s: float = 10) -> None:
    """Kill everything in a cgroup and its children, then remove them all.

    Raises:
        OSError: still busy after patience_s seconds.
    """
    kill(folder)
    deadline = time.monotonic() + patience_s
    below = sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True)
    for cgroup in [*below, folder]:
        while True:
            try:
                cgroup.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:  # EBUSY while what was killed is still on its way out
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)


def cpu_seconds(folder: Path) -> float:
    """CPU time that a cgroup and its children have used since they were made.

    From cpu.stat, which every cgroup2 has, also where the cpu controller is bound to v1. The
    scheduler keeps it in nanoseconds (its split into user and system is a guess by ticks). Softirq
    work counts for the task on whose time it ran.
    """
    for line in (folder / "cpu.stat").read_text().splitlines():
        key, value = line.split()
        if key == "usage_usec":
            return int(value) / 1e6
    raise RuntimeError(f"{folder}/cpu.stat has no usage_usec")
