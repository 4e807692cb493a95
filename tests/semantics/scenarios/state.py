# SPDX-License-Identifier: Apache-2.0
"""What a socket says of itself."""

from __future__ import annotations

import array
import fcntl
import socket
import struct
import termios

from tests.semantics.scenario import Io, Limit, exactly, scenario, settle

SIOCOUTQ = termios.TIOCOUTQ
SIOCATMARK = 0x8905


def ioctl_int(sock: socket.socket, request: int) -> int:
    """An ioctl that answers with an int."""
    value = array.array("i", [-1])
    fcntl.ioctl(sock, request, value)
    return value[0]


@scenario(
    Limit(
        "FIONREAD (SIOCINQ) says 0 although bytes are there, where it cannot be mended: for "
        "bypassed bytes, or for TCP bytes of a socket in a sockhash. nginx and Java may stall; the "
        "self-test finds it and allows only proxy-only",
        "let the node stay proxy-only, or exclude the port",
        everywhere=False,
    )
)
def unread_bytes(io: Io) -> None:
    """FIONREAD: before, with and after data, and half of it read"""
    sender, receiver = io.pair()
    io.log("nothing there", ioctl_int(receiver, termios.FIONREAD))
    sender.sendall(b"x" * 600)
    sender.sendall(b"y" * 400)
    settle()
    io.log("two writes", ioctl_int(receiver, termios.FIONREAD))
    exactly(receiver, 500)
    io.log("half of it read", ioctl_int(receiver, termios.FIONREAD))
    exactly(receiver, 500)
    io.log("all of it read", ioctl_int(receiver, termios.FIONREAD))


@scenario()
def unsent_bytes(io: Io) -> None:
    """SIOCOUTQ once everything has arrived"""
    sender, receiver = io.pair()
    sender.sendall(b"x" * 1000)
    exactly(receiver, 1000)
    settle()
    io.log("SIOCOUTQ", ioctl_int(sender, SIOCOUTQ))


@scenario()
def at_mark(io: Io) -> None:
    """SIOCATMARK without urgent data"""
    sender, receiver = io.pair()
    sender.sendall(b"data")
    settle()
    io.log("SIOCATMARK", ioctl_int(receiver, SIOCATMARK))


@scenario(
    Limit(
        "The byte and segment counters of TCP_INFO (ss -i) count only what went by TCP",
        "count with tcpip-bypass-node status instead",
    )
)
def tcp_info_counters(io: Io) -> None:
    """TCP_INFO: bytes sent and received"""
    sender, receiver = io.pair()
    sender.sendall(b"x" * 5000)
    exactly(receiver, 5000)
    settle()
    # struct tcp_info (linux/tcp.h): tcpi_bytes_acked at 120, tcpi_bytes_received at 128
    (acked,) = struct.unpack_from("Q", tcp_info(sender), 120)
    (received,) = struct.unpack_from("Q", tcp_info(receiver), 128)
    io.log("sender: acknowledged", acked >= 5000)
    io.log("receiver: received", received >= 5000)


def tcp_info(sock: socket.socket) -> bytes:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)


@scenario()
def tcp_info_states(io: Io) -> None:
    """TCP_INFO: the state, through shutdown and close"""
    sender, receiver = io.pair()
    io.log("standing", [tcp_info(sender)[0], tcp_info(receiver)[0]])
    sender.sendall(b"data")
    sender.shutdown(socket.SHUT_WR)
    settle()
    io.log("half closed", [tcp_info(sender)[0], tcp_info(receiver)[0]])
    exactly(receiver, 5)
    receiver.close()
    settle()
    io.log("closed", tcp_info(sender)[0])


@scenario()
def keepalive(io: Io) -> None:
    """SO_KEEPALIVE and its times, as nobody has set them"""
    sender, _ = io.pair()
    io.log("SO_KEEPALIVE", sender.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
    io.log("TCP_KEEPIDLE", sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))
    io.log("TCP_KEEPINTVL", sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL))


@scenario()
def own_keepalive(io: Io) -> None:
    """Keepalive times that the application has chosen stay as they are"""
    own = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 77, "TCP_KEEPINTVL": 7}
    sender, receiver = io.pair(both=own)
    for sock in (sender, receiver):
        io.log("SO_KEEPALIVE", sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        io.log("TCP_KEEPIDLE", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))
        io.log("TCP_KEEPINTVL", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL))


@scenario()
def options_kept(io: Io) -> None:
    """Options set on an established connection read back as they were set"""
    sender, receiver = io.pair()
    for sock in (sender, receiver):
        for option in (socket.TCP_NODELAY, socket.TCP_USER_TIMEOUT):
            sock.setsockopt(socket.IPPROTO_TCP, option, 1)
            io.log(f"TCP option {option}", sock.getsockopt(socket.IPPROTO_TCP, option))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
        io.log("SO_RCVBUF", sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
        io.log("SO_TYPE", sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE))
        io.log("SO_PROTOCOL", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL))
    sender.sendall(b"x" * 40_000)
    io.log("received", exactly(receiver, 40_000))
