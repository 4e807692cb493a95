# SPDX-License-Identifier: Apache-2.0
"""The node's own mounts and root, of which a pod sees little: found, and entered.

``proc`` is a /proc of the node's PID namespace. This process' own /proc means that it is in no pod:
it sees what the node sees.
"""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cni_plugin import cgroup, netns

OWN_PROC = Path("/proc")
POD_PROC = Path("/host/proc")  # where the DaemonSet's pod has the node's
_CLONE_NEWNS = 0x00020000  # linux/sched.h
CANNOT_ENTER, NOT_THERE = 126, 127  # as a shell ends


@dataclass(frozen=True)
class _Mount:
    """One line of /proc/PID/mountinfo."""

    number: int
    device: str
    root: Path  # what of the file system is mounted
    point: Path  # where
    noexec: bool


def node_proc() -> Path:
    """The node's /proc, as far as that can be seen from here: in a pod, the one mounted for it."""
    return POD_PROC if (POD_PROC / "1").exists() else OWN_PROC


def enter_mounts(namespace: Path) -> None:
    """This process, which has one thread, moves into a mount namespace. Raises OSError."""
    with namespace.open("rb") as file:
        netns.enter(file.fileno(), str(namespace), _CLONE_NEWNS)


def enter(proc: Path) -> None:
    """This process sees what the node's first process sees. Raises OSError.

    Takes SYS_ADMIN, SYS_CHROOT and SYS_PTRACE. setns(2) leads to the namespace's root, from which
    that process may have moved to another.
    """
    root = os.open(proc / "1/root", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        enter_mounts(proc / "1/ns/mnt")
        os.fchdir(root)
        os.chroot(".")
    finally:
        os.close(root)


def main(proc: str, *argv: str) -> None:
    """Becomes a program of the node's, found there by its name; a process with one thread can."""
    status = CANNOT_ENTER
    try:
        enter(Path(proc))
        status = NOT_THERE
        os.execvp(argv[0], argv)
    except OSError as error:  # a traceback would ask for files that may not be here any more
        os.write(2, f"{argv[0]} by {proc}: {error.strerror}\n".encode())
    os._exit(status)


def path_on_node(folder: Path, proc: Path) -> Path:
    """What the node calls a folder that this process sees, perhaps as a mount of its own.

    Of several names the one through the mount of least of the file system that allows execution as
    the mount here does. Raises OSError when the node has none.
    """
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        here = os.fstat(fd)
        info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    number = int(info.partition("mnt_id:")[2].split()[0])
    found = []
    for mount in (each for each in _mounts(OWN_PROC / "self") if each.number == number):
        inside = mount.root / folder.resolve().relative_to(mount.point)
        for each in _mounts(proc / "1"):
            if each.device == mount.device and inside.is_relative_to(each.root):
                path = each.point / inside.relative_to(each.root)
                if _is(proc / "1/root" / path.relative_to("/"), here):
                    found.append((each.noexec == mount.noexec, len(each.root.parts), path))
    if not found:
        raise FileNotFoundError(
            errno.ENOENT, "it is nowhere in the node's mount namespace", str(folder)
        )
    return max(found)[2]


def _mounts(process: Path) -> list[_Mount]:
    found = []
    for line in (process / "mountinfo").read_bytes().strip().split(b"\n"):  # others are in names
        number, _, device, root, point, options, *_ = map(os.fsdecode, line.split(b" "))
        found.append(
            _Mount(
                int(number),
                device,
                Path(cgroup.unescaped(root)),
                Path(cgroup.unescaped(point)),
                "noexec" in options.split(","),
            )
        )
    return found


def _is(path: Path, same: os.stat_result) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (same.st_dev, same.st_ino)


if __name__ == "__main__":
    main(*sys.argv[1:])
