# SPDX-License-Identifier: Apache-2.0
"""What a run of the testbed leaves on the machine: found, listed, removed."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bed import cgroups, netns

RUNS = Path("/run")
NAME = re.compile(r"tb-(\d+)-\d+")


def run_name(number: int) -> str:
    """The name of this process' so-many-th bed, counted from 0."""
    return f"tb-{os.getpid()}-{number}"


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and its like until the block is done.

    By handlers, not by a signal mask: another thread would take the signal, and Python would run
    the handler in the main thread all the same. Other threads than the main one are never
    interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda came, _frame: held.append(came))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])


def remove_dead_runs(live: set[str]) -> None:
    """Remove what runs have left whose process is gone; `live` are this process' own."""
    for folder in RUNS.glob("tb-*"):
        match = NAME.fullmatch(folder.name)
        if match is None or folder.name in live:
            continue
        pid = int(match[1])
        if pid == os.getpid() or not Path(f"/proc/{pid}").exists():
            remove_run(folder.name)


def remove_run(name: str) -> None:
    """Remove everything that carries a run's name; nothing there is fine."""
    folder = RUNS / name
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # another run may be sweeping the same
        cgroups.remove(cgroups.mount_point() / name)
        for namespace in netns.names(f"{name}-"):
            netns.remove(namespace)
        for mount in mounts_below(folder):
            subprocess.run(["umount", mount], check=True)
        shutil.rmtree(folder, ignore_errors=not folder.exists())
    finally:
        os.close(fd)


def mounts_below(folder: Path) -> list[Path]:
    """Mount points in a folder, the newest first."""
    points = [
        Path(line.split()[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()
    ]
    return [point for point in reversed(points) if folder in point.parents]


def leftovers(name: str) -> dict[str, list[str]]:
    """What still carries a run's name, by kind; every list is empty after a clean run."""
    folder = RUNS / name
    return {
        "cgroups": [
            str(path)
            for path in [
                *cgroups.mount_point().glob(name),
                *cgroups.mount_point().glob(f"{name}/**/*/"),
            ]
        ],
        "network namespaces": netns.names(f"{name}-"),
        "mounts": [str(path) for path in mounts_below(folder)],
        "files": [str(path) for path in [*RUNS.glob(name), *folder.rglob("*")]],
    }
