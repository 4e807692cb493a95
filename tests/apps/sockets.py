# SPDX-License-Identifier: Apache-2.0
"""The TCP sockets of a network namespace, and the bytes that came in, from /proc/net."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.bed.netns import NetNamespace

SETTLE_S = 5.0

# include/net/tcp_states.h
ESTABLISHED, FIN_WAIT1, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 1, 4, 8, 9, 10, 11
NAMES = {FIN_WAIT1: "FIN_WAIT1", CLOSE_WAIT: "CLOSE_WAIT", LAST_ACK: "LAST_ACK", CLOSING: "CLOSING"}


class Socket(NamedTuple):
    """One line: the ports and the state."""

    port: int
    peer_port: int
    state: int

    def __str__(self) -> str:
        return f"{NAMES.get(self.state, self.state)} {self.port} -> {self.peer_port}"


def all_of(space: NetNamespace) -> list[Socket]:
    """Every TCP socket there is now."""
    with space.entered():
        return list(_read())


def _read() -> Iterator[Socket]:
    for name in ("tcp", "tcp6"):
        path = Path("/proc/thread-self/net") / name
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _number, local, peer, state, *_ = line.split()
            yield Socket(_port(local), _port(peer), int(state, 16))


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def received_bytes(space: NetNamespace) -> int:
    """What its IP has received so far, headers included, also over loopback."""
    with space.entered():
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    header, values = (line.split() for line in lines if line.startswith("IpExt:"))
    return int(values[header.index("InOctets")])


def listens(space: NetNamespace, port: int) -> bool:
    """Whether a socket listens on this port."""
    return any(each.state == LISTEN and each.port == port for each in all_of(space))


def unclosed(*spaces: NetNamespace) -> list[Socket]:
    """What is still half-closed after SETTLE_S seconds; TCP leaves nothing there.

    FIN_WAIT2 and TIME_WAIT are no part of it: those end by a clock of the kernel's.
    """
    deadline = time.monotonic() + SETTLE_S
    while True:
        left = [each for space in spaces for each in all_of(space) if each.state in NAMES]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)
