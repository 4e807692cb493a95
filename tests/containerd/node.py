# SPDX-License-Identifier: Apache-2.0
"""A node's namespaces, folders and cgroups, with nothing running in them yet.

Everything is named after the run (`tbc-<pid>-<n>`): a folder in /run, a network namespace, and a
cgroup in every hierarchy. What a killed run leaves, the next one removes.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.bed import cgroups, netns, sweep
from tests.bed.netns import NetNamespace
from tests.bed.node import is_report
from tests.bed.pod import within

HOLD_NAMESPACE = Path(__file__).with_name("node.sh")
PREFIX = "tbc-"
COMMAND_TIMEOUT_S = 120

_numbers = itertools.count()


@dataclass(frozen=True)
class Node:
    """Where a runtime can live; its processes are those in `system` and below `pods`."""

    name: str
    folder: Path
    host: NetNamespace
    cgroup: Path
    holder: int  # the process that keeps the mount namespace

    @property
    def system(self) -> Path:
        """The cgroup of the runtime and its shims."""
        return self.cgroup / "system"

    @property
    def pods(self) -> Path:
        """The cgroup that kubelet makes pods' cgroups in."""
        return self.cgroup / "kubepods" / "burstable"

    def outside(self, path: Path) -> Path:
        """Where the rest of the machine finds a path in this node's /run; mounts do not show."""
        return self.folder / "run" / path.relative_to("/run")

    def inside(self, path: Path) -> Path:
        """Where the rest of the machine finds a path as this node's mounts have it."""
        return Path(f"/proc/{self.holder}/root{path}")

    def processes(self) -> dict[int, str]:
        """Names of the processes on this node, those in pods included, by pid."""
        found = {}
        for folder in folders_in(self.cgroup):
            pids = ""
            with suppress(OSError):  # the cgroup has gone since we saw it
                pids = (folder / "cgroup.procs").read_text()
            for pid in pids.split():
                with suppress(OSError):  # that process has gone
                    found[int(pid)] = Path("/proc", pid, "comm").read_text().strip()
        return found

    def entering(self, argv: Sequence[str | Path]) -> list[str | Path]:
        """The command line that runs argv in this node's namespaces and system cgroup."""
        mounts = f"--mount=/proc/{self.holder}/ns/mnt"
        command = ["nsenter", mounts, "--", *argv]
        return within(command, netns=self.host.path, cgroup=self.system)

    def run(self, argv: Sequence[str | Path], stdin: str = "", *, reporting: str = "") -> str:
        """Run a program on this node to its end and return what it printed.

        reporting: the node program's command that it is, whose exit status may be an answer.

        Raises:
            RuntimeError: it failed; the message holds its output.
        """
        done = subprocess.run(
            self.entering(argv),
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",  # a damaged program is read as a script, and quoted
            timeout=COMMAND_TIMEOUT_S,
            start_new_session=True,
            check=False,
        )
        if done.returncode != 0 and not is_report(reporting, done.returncode, done.stdout):
            command = " ".join(map(str, argv))
            raise RuntimeError(
                f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}"
            )
        return done.stdout


@contextmanager
def made() -> Iterator[Node]:
    """A node, removed on leaving with every process on it."""
    remove_dead_runs()
    name = f"{PREFIX}{os.getpid()}-{next(_numbers)}"
    folder = sweep.RUNS / name
    try:
        folder.mkdir(mode=0o755)
        cgroup = cgroups.mount_point() / name
        (cgroup / "system").mkdir(parents=True)
        with netns.created(f"{name}-node") as host, _held(folder, cgroup, host) as holder:
            yield Node(name, folder, host, cgroup, holder)
    finally:
        with sweep.uninterrupted():
            remove(name)


@contextmanager
def _held(folder: Path, cgroup: Path, host: NetNamespace) -> Iterator[int]:
    """A mount namespace for the node; the pid of a process in it."""
    unshare = ["unshare", "--mount", "--propagation", "private"]
    holder = subprocess.Popen(
        within([*unshare, HOLD_NAMESPACE, folder], netns=host.path, cgroup=cgroup / "system"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with holder:  # on leaving: its stdin is closed, so it ends, and is waited for
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{HOLD_NAMESPACE} failed; what it said is above")
        yield holder.pid


def remove_dead_runs() -> None:
    """Remove what runs have left whose process is gone."""
    for folder in sweep.RUNS.glob(f"{PREFIX}*"):
        pid = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", pid).exists():
            remove(folder.name)


def remove(name: str) -> None:
    """Remove everything that carries a run's name; nothing there is fine."""
    cgroups.remove(cgroups.mount_point() / name)  # ends the processes, which hold the mounts
    remove_v1_cgroups(name)
    sweep.remove_run(name)


def remove_v1_cgroups(path: str) -> None:
    """Remove a cgroup and its children from every hierarchy of cgroup v1.

    runc makes a sandbox' folders there too, and removes the innermost only.
    """
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in mounts:
        if mount[mount.index("-") + 1] == "cgroup":
            for folder in folders_in(Path(mount[4]) / path):
                with suppress(FileNotFoundError):  # containerd was faster
                    folder.rmdir()


def folders_in(folder: Path) -> list[Path]:
    """A folder and all below it, children first; what vanishes meanwhile is passed over."""
    return [Path(each) for each, _, _ in os.walk(folder, topdown=False)]
