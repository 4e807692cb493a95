# SPDX-License-Identifier: Apache-2.0
"""Network namespaces by path, through setns(2) (os.setns came with Python 3.12); their users."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cni_plugin import names

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_CLONE_NEWUSER = 0x10000000
_NS_GET_USERNS = 0xB701  # linux/nsfs.h
_OWN = Path("/proc/self/ns/net")
_OWN_USERS = Path("/proc/self/ns/user")


def is_own(path: str) -> bool:
    """Whether ``path`` is this process's own namespace; False when it is gone."""
    try:
        return os.path.samestat(Path(path).stat(), _OWN.stat())
    except (OSError, ValueError):
        return False


def enter(fd: int, path: str, kind: int = _CLONE_NEWNET) -> None:
    """Put this thread into a namespace, by its file; `path` is for the OSError that this raises."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, kind) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)


@contextmanager
def entered(path: str) -> Iterator[None]:
    """Run the body in the network namespace at ``path``; raises OSError."""
    own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter(target, path)
        finally:
            os.close(target)
        try:
            yield
        finally:
            enter(own, str(_OWN))
    finally:
        os.close(own)


def uid_on_host(path: str, uid: int) -> int:
    """The user ``uid`` of the pod with the network namespace at ``path``, as the host counts.

    A pod with ``hostUsers: false`` has a user namespace, which owns its network namespace
    (ioctl_ns(2)). names.NO_UID: the pod has no such user. Raises OSError.
    """
    space = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        users = fcntl.ioctl(space, _NS_GET_USERNS)
    finally:
        os.close(space)
    try:
        if os.path.samestat(os.fstat(users), _OWN_USERS.stat()):
            return uid
        lines = _uid_map(users)
    finally:
        os.close(users)
    for first, first_on_host, count in lines:
        if first <= uid < first + count:
            return first_on_host + uid - first
    return names.NO_UID


def _uid_map(users: int) -> list[list[int]]:
    """Lines of user_namespaces(7): only a process shows them, so a child enters and ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else an ended child is not to be seen
    child = os.fork()
    if not child:
        try:
            enter(users, str(_OWN_USERS), _CLONE_NEWUSER)
        except BaseException:  # the parent's clean-up is not the child's
            os._exit(1)
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        has_entered = os.path.samestat(Path(f"/proc/{child}/ns/user").stat(), os.fstat(users))
        text = Path(f"/proc/{child}/uid_map").read_text()  # as our own namespace counts
    finally:
        os.waitpid(child, 0)
    if not has_entered:  # or /proc is that of other processes
        raise OSError(errno.EPERM, "cannot enter the user namespace of the pod")
    return [[int(word) for word in line.split()] for line in text.splitlines()]
