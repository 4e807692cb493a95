# SPDX-License-Identifier: Apache-2.0
"""Visits to sockets by their addresses, where the kernel asks for it: bpf/data_path/lookup.h."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator

from bpf import abi, bpfsys
from cni_plugin import netns

_ETHERNET_HEADER = bytes(14)
_HOME = "/proc/thread-self/ns/net"
_SIOCGSKNS = 0x894C
_SYS_PIDFD_GETFD = 438
SO_COOKIE = 57  # asm-generic/socket.h
# The file was closed meanwhile, its process has ended, the number is no socket's any more, or the
# device that the socket is bound to has gone.
_GONE = {errno.EBADF, errno.ESRCH, errno.ENOTSOCK, errno.ENODEV}

_libc = ctypes.CDLL(None, use_errno=True)


def copied(process: int, fd: int) -> int:
    """A copy of another process's file, by its pidfd and the file's number there; to be closed.

    Raises OSError; PermissionError where the kernel does not let this process have it.
    """
    copy: int = _libc.syscall(_SYS_PIDFD_GETFD, process, fd, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), f"pidfd_getfd: {os.strerror(ctypes.get_errno())}")
    return copy


@contextlib.contextmanager
def networks() -> Iterator[Callable[[int, int], None]]:
    """Yields what puts this thread into a socket's network namespace, by the namespace's inode
    number and a copy of the socket's file. In the end it is in its own again."""
    with bpfsys.closing(os.open(_HOME, os.O_RDONLY)) as home:
        entered = at_home = os.fstat(home).st_ino

        def enter(number: int, copy: int) -> None:
            nonlocal entered
            if number != entered:
                with bpfsys.closing(fcntl.ioctl(copy, _SIOCGSKNS)) as there:
                    netns.enter(there, "a socket's")
                    entered = os.fstat(there).st_ino

        try:
            yield enter
        finally:
            if entered != at_home:
                netns.enter(home, _HOME)


def _cookie(fd: int) -> int:
    """Of a socket. Python's own getsockopt() is a method of an object that asks for more, under the
    socket's lock. Raises OSError."""
    value, size = ctypes.c_uint64(), ctypes.c_uint32(8)
    arguments = (fd, socket.SOL_SOCKET, SO_COOKIE, ctypes.byref(value), ctypes.byref(size))
    if _libc.getsockopt(*arguments):
        raise OSError(ctypes.get_errno(), f"getsockopt: {os.strerror(ctypes.get_errno())}")
    return value.value


def visit(process: int, sockets: list[abi.Found], wake: Callable[[int], None]) -> bool:
    """Visit these sockets of a process, by its pidfd; `wake` gives a reader a new edge, by the
    number of its file there.

    The file is held meanwhile, so the socket cannot be closed. Returns whether a socket may take
    its next step on its way out. Raises OSError, after all others were visited.
    """
    needs, failure = 0, None
    with bpfsys.closing(bpfsys.prog_open(sockets[0].visitor)) as visitor, networks() as enter:
        for found in {each.sk: each for each in sockets}.values():
            try:
                with bpfsys.closing(copied(process, found.fd)) as copy:
                    if _cookie(copy) != found.cookie:  # the number is another socket's by now
                        continue
                    enter(found.netns, copy)
                    packet = _ETHERNET_HEADER + bytes(found)
                    of_one = bpfsys.prog_run(visitor, packet, found.device)
            except OSError as error:
                failure = failure if error.errno in _GONE else error
                continue
            needs |= of_one
            if of_one & abi.NEEDS_EDGE:
                wake(found.fd)
    if failure:
        raise failure
    return bool(needs & abi.NEEDS_VISIT)
