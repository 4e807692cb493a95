# SPDX-License-Identifier: Apache-2.0
"""The TCP sockets of one network namespace, as the kernel's sock_diag tells them."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import Any

from pyroute2 import DiagSocket

from cni_plugin import netns

# linux/inet_diag.h: the attributes that a request asks for, and net/tcp_states.h.
_INFO, _CONG, _SKMEMINFO = 2, 4, 7
_EXTENSIONS = sum(1 << (number - 1) for number in (_INFO, _CONG, _SKMEMINFO))
STATES = (
    *("UNKNOWN", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT"),
    *("CLOSE", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING"),
)
LISTEN = STATES.index("LISTEN")
_WANTED = sum(1 << STATES.index(each) for each in ("ESTABLISHED", "CLOSE_WAIT", "LISTEN"))
_WANTED |= 1 << STATES.index("FIN_WAIT1") | 1 << STATES.index("FIN_WAIT2")
_ULP_NAME = 1  # INET_ULP_INFO_NAME
_TCP_RMEM = Path("/proc/sys/net/ipv4/tcp_rmem")
_RMEM_MAX = Path("/proc/sys/net/core/rmem_max")

Address = tuple[str, int]


@dataclass(frozen=True)
class Socket:
    """One socket at one moment. Bytes and segments are counted since it was made."""

    cookie: int
    inode: int  # 0: no file yet, or none any more
    uid: int
    state: str
    local: Address
    peer: Address
    sent: int  # bytes that were acknowledged
    received: int
    segments: int  # with data, sent
    segments_received: int
    mss: int
    congestion: str
    ulp: str
    rcvbuf: int
    sndbuf: int
    unread: int
    unsent: int

    @property
    def is_listener(self) -> bool:
        return self.state == STATES[LISTEN]


@dataclass(frozen=True)
class Buffers:
    """A namespace's sysctls that say how large a receive buffer is before anybody sets it."""

    first: int  # net.ipv4.tcp_rmem, its second number
    settable: int  # what SO_RCVBUF can make it at most: twice net.core.rmem_max


@dataclass(frozen=True)
class Dump:
    """A namespace at one moment."""

    sockets: list[Socket]
    buffers: Buffers


def dump(namespace: str) -> Dump:
    """The sockets of the network namespace at that path; raises OSError when it is gone."""
    with netns.entered(namespace):
        buffers = Buffers(int(_TCP_RMEM.read_text().split()[1]), _settable())
        with DiagSocket() as diag:
            diag.bind()
            return Dump(list(_sockets(diag)), buffers)


def _settable() -> int:
    try:
        return 2 * int(_RMEM_MAX.read_text())
    except OSError:  # only the first namespace has it, before Linux 5.19 or so
        return 0


def _sockets(diag: DiagSocket) -> Iterator[Socket]:
    for family in (AF_INET, AF_INET6):
        found = diag.get_sock_stats(family=family, states=_WANTED, extensions=_EXTENSIONS)
        for message in found:
            if message.get("idiag_state") is not None:  # else the end of the list
                yield _socket(message)


def _socket(message: Any) -> Socket:
    info = message.get_attr("INET_DIAG_INFO") or {}
    memory = _words(message.get_attr("INET_DIAG_SKMEMINFO"))
    return Socket(
        cookie=message["idiag_cookie"],
        inode=message["idiag_inode"],
        uid=message["idiag_uid"],
        state=STATES[message["idiag_state"]],
        local=(plain(message["idiag_src"]), message["idiag_sport"]),
        peer=(plain(message["idiag_dst"]), message["idiag_dport"]),
        sent=info.get("tcpi_bytes_acked", 0),
        received=info.get("tcpi_bytes_received", 0),
        segments=info.get("tcpi_data_segs_out", 0),
        segments_received=info.get("tcpi_data_segs_in", 0),
        mss=info.get("tcpi_snd_mss", 0),
        congestion=message.get_attr("INET_DIAG_CONG") or "",
        ulp=_ulp(message.get_attr("INET_DIAG_ULP_INFO")),
        rcvbuf=memory[1],  # SK_MEMINFO_RCVBUF
        sndbuf=memory[3],  # SK_MEMINFO_SNDBUF
        unread=message["idiag_rqueue"],
        unsent=message["idiag_wqueue"],
    )


def plain(address: str) -> str:
    """An IPv4 address that an IPv6 socket has is written as IPv4's own."""
    mapped = getattr(ipaddress.ip_address(address), "ipv4_mapped", None)
    return str(mapped or address)


def _words(text: str | None) -> tuple[int, ...]:
    data = bytes.fromhex((text or "").replace(":", ""))
    words = struct.unpack(f"={len(data) // 4}I", data)
    return words if len(words) > 3 else (0, 0, 0, 0)


def _ulp(text: str | None) -> str:
    """The name in the nested attributes: length, type, value, each padded to four bytes."""
    data = bytes.fromhex((text or "").replace(":", ""))
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if kind == _ULP_NAME:
            return data[4:length].rstrip(b"\0").decode("ascii", "replace")
        data = data[max(4, (length + 3) & ~3) :]
    return ""
