# SPDX-License-Identifier: Apache-2.0
"""Visits to sockets by their addresses, where the kernel asks for it: bpf/data_path/lookup.h.

The caller holds the socket's file, in place of the iterator. So the socket cannot be closed during
the visit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from collections.abc import Iterator

from bpf import abi, bpfsys

_NO_ETHERNET = bytes(14)
_PACKET = 64  # bytes: the kernel takes no packet that is much shorter
_CLONE_NEWNET = 0x40000000
_SO_BINDTOIFINDEX = 62
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, an IPv4 address of an IPv6 socket

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def network_of(process: int) -> Iterator[None]:
    """This thread is in the network namespace of a process, by its pidfd. Raises OSError."""
    with bpfsys.closing(os.open("/proc/thread-self/ns/net", os.O_RDONLY)) as own:
        _enter(process)
        try:
            yield
        finally:
            _enter(own)


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")


def _end(address: tuple[str, int], family: int) -> tuple[bytes, bytes]:
    """An address and a port, in network byte order."""
    return socket.inet_pton(family, address[0]), address[1].to_bytes(2, "big")


def packet(copy: socket.socket, sk: int) -> bytes:
    """What the visiting program reads: a struct tb_lookup. Raises OSError if it has no peer."""
    family = copy.family
    (peer, peer_port), (own, own_port) = (
        _end(address[:2], family) for address in (copy.getpeername(), copy.getsockname())
    )
    is_ipv4 = family == socket.AF_INET or peer.startswith(_MAPPED)
    ends = peer[-4:] + own[-4:] if is_ipv4 else peer + own
    lookup = abi.Lookup(sk=sk, is_ipv4=is_ipv4)
    ctypes.memmove(lookup.tuple, ends + peer_port + own_port, len(ends) + 4)
    return (_NO_ETHERNET + bytes(lookup)).ljust(_PACKET, b"\0")


def visit(found: abi.Found, copy: socket.socket) -> int:
    """Visit a socket, by a copy of its file; what it needs: NEEDS_EDGE and NEEDS_VISIT of abi.py.

    Call it within network_of(). Raises OSError.
    """
    if copy.family not in (socket.AF_INET, socket.AF_INET6):  # the number is another file's by now
        return 0
    device = copy.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX)
    with bpfsys.closing(bpfsys.prog_open(found.visitor)) as program:
        return bpfsys.prog_run(program, packet(copy, found.sk), device)
