# SPDX-License-Identifier: Apache-2.0
"""Become a process of a pod, then exec: `enter.py NETNS CGROUP USER CPUS PROGRAM [ARGUMENT...]`.

Run as a program of its own, because what it does (join a cgroup, a network namespace and another
user) must happen between fork and exec, where a threaded Python may not run code. CGROUP is a
cgroup2 folder, USER a number or UID:GID, CPUS a comma-separated list; each of the four may be "-"
for "stay as you are".
Imports nothing that makes it start slower than it must.
"""

import ctypes
import os
import sys
from collections.abc import Sequence

# linux/sched.h, linux/prctl.h, linux/capability.h
CLONE_NEWNET = 0x40000000
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_READ_SEARCH = 2
LINUX_CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def must(result: int, what: str) -> None:
    """Raise OSError with errno and what was tried, unless a libc call returned 0."""
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def join_netns(path: str) -> None:
    """Move this process into the network namespace at path."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    must(libc.setns(fd, CLONE_NEWNET), f"setns to {path}")
    os.close(fd)


def join_cgroup(folder: str) -> None:
    """Move this process into a cgroup, so that its sockets belong to it."""
    fd = os.open(f"{folder}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    os.write(fd, b"0")
    os.close(fd)


def become(uid: int, gid: int) -> None:
    """Become that user, but still able to reach a checkout below a closed home folder."""
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    if not uid:
        return
    must(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "prctl(PR_SET_KEEPCAPS)")
    os.setresuid(uid, uid, uid)
    capability = 1 << CAP_DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(capability, capability, capability)  # effective, permitted, inh.
    must(libc.capset(header, sets), "capset")
    must(
        libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH, 0, 0),
        "prctl(PR_CAP_AMBIENT_RAISE)",
    )


def main(arguments: Sequence[str]) -> None:
    """Join everything that was asked for, then become the program."""
    netns, cgroup, user, cpus, *argv = arguments
    if cgroup != "-":
        join_cgroup(cgroup)
    if netns != "-":
        join_netns(netns)
    if cpus != "-":
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    if user not in {"-", "0"}:
        uid, _, gid = user.partition(":")
        become(int(uid), int(gid or uid))
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"enter.py: {' '.join(sys.argv[1:])}: {error}")
