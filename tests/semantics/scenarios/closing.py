# SPDX-License-Identifier: Apache-2.0
"""How a connection ends."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time

from tests.semantics.scenario import (
    PATIENCE_S,
    SETTLE_S,
    Io,
    Limit,
    abort,
    attempt,
    exactly,
    pattern,
    poll_mask,
    readable,
    recv,
    scenario,
    settle,
    to_end,
)
from tests.semantics.scenarios.blocking import EXCLUDE


@scenario()
def close_after_data(io: Io) -> None:
    """close right after a write: the data, then the end"""
    sender, receiver = io.pair()
    sender.sendall(pattern(30_000))
    sender.close()
    io.log("received", to_end(receiver))


@scenario()
def half_close_then_reply(io: Io) -> None:
    """A reply after the asker has shut down its sending side"""
    sender, receiver = io.pair()
    sender.sendall(b"request")
    sender.shutdown(socket.SHUT_WR)
    io.log("request", to_end(receiver))
    receiver.sendall(pattern(30_000))
    receiver.close()
    settle()  # the reply lies unread while the asker's socket goes through its last states
    io.log("reply", to_end(sender))


@scenario()
def half_close_slow_answer(io: Io) -> None:
    """The asker has shut down its sending side, the answer comes in ten parts"""
    sender, receiver = io.pair()
    sender.sendall(b"request")
    sender.shutdown(socket.SHUT_WR)
    io.log("request", to_end(receiver))
    for number in range(10):
        receiver.sendall(b"part %d," % number)
        time.sleep(SETTLE_S / 2)
        io.log(f"part {number}", sender.recv(100))
    receiver.close()
    io.log("end", to_end(sender))


@scenario()
def half_close_both(io: Io) -> None:
    """Both shut down their sending sides, then read"""
    sender, receiver = io.pair()
    sender.sendall(b"from the sender")
    receiver.sendall(b"from the receiver")
    sender.shutdown(socket.SHUT_WR)
    receiver.shutdown(socket.SHUT_WR)
    settle()
    io.log("receiver reads", to_end(receiver))
    io.log("sender reads", to_end(sender))
    io.log("poll", [poll_mask(sender), poll_mask(receiver)])


@scenario()
def half_close_other_order(io: Io) -> None:
    """The receiver shuts down first, the sender goes on sending"""
    sender, receiver = io.pair()
    receiver.shutdown(socket.SHUT_WR)
    io.log("sender sees", to_end(sender))
    for number in range(20):
        sender.sendall(b"%d," % number)
    sender.shutdown(socket.SHUT_WR)
    io.log("received", to_end(receiver))


@scenario()
def shutdown_reading(io: Io) -> None:
    """shutdown(SHUT_RD), then data comes"""
    sender, receiver = io.pair()
    receiver.shutdown(socket.SHUT_RD)
    io.log("empty", recv(receiver, 100, socket.MSG_DONTWAIT))
    io.log("send", attempt(sender.send, b"data"))
    settle()
    io.log("recv", recv(receiver, 100, socket.MSG_DONTWAIT))
    io.log("poll", poll_mask(receiver))


@scenario()
def shutdown_both_ways(io: Io) -> None:
    """shutdown(SHUT_RDWR) with data unread at both ends"""
    sender, receiver = io.pair()
    sender.sendall(b"to the receiver")
    receiver.sendall(b"to the sender")
    settle()
    receiver.shutdown(socket.SHUT_RDWR)
    settle()
    io.log("receiver reads", to_end(receiver))
    io.log("sender reads", to_end(sender))
    io.log("receiver sends", attempt(receiver.send, b"x", socket.MSG_NOSIGNAL))


@scenario()
def shutdown_twice(io: Io) -> None:
    """shutdown a second time, and after the peer has closed"""
    sender, receiver = io.pair()
    io.log("first", attempt(sender.shutdown, socket.SHUT_WR))
    io.log("second", attempt(sender.shutdown, socket.SHUT_WR))
    receiver.close()
    settle()
    io.log("after the end", attempt(sender.shutdown, socket.SHUT_RDWR))


UNREAD = Limit(
    "A socket closed with bypassed bytes unread sends FIN where TCP sends RST: the peer's recv "
    "says end of file instead of ECONNRESET",
    "nothing, unless the application tells a broken exchange by ECONNRESET alone; then " + EXCLUDE,
)


@scenario(UNREAD)
def close_with_unread_data(io: Io) -> None:
    """The receiver closes with data unread"""
    sender, receiver = io.pair()
    sender.sendall(b"never read")
    settle()
    receiver.close()
    settle()
    io.log("sender's poll", poll_mask(sender))
    io.log("sender's recv", attempt(sender.recv, 100))


@scenario(UNREAD)
def close_with_unread_data_after_answer(io: Io) -> None:
    """The receiver answers and closes with data unread: is the answer readable?"""
    sender, receiver = io.pair()
    sender.sendall(b"request, of which only part is read")
    exactly(receiver, 7)
    receiver.sendall(b"answer")
    settle()
    receiver.close()
    settle()
    io.log("answer", attempt(sender.recv, 100))
    io.log("then", attempt(sender.recv, 100))


@scenario(UNREAD)
def killed_with_unread_data(io: Io) -> None:
    """kill -9 of the receiver with data unread"""
    sender, receiver = io.pair()
    victim = os.fork()
    if not victim:
        signal.pause()
    receiver.close()
    sender.sendall(b"never read")
    settle()
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    settle()
    io.log("sender's recv", attempt(sender.recv, 100))
    settle()
    io.log("sends", sends_until_failure(sender))


def sends_until_failure(sock: socket.socket) -> str:
    """The errno that sending ends with; how many sends it takes depends on timing."""
    for _ in range(20):
        done = attempt(sock.send, b"x", socket.MSG_NOSIGNAL)
        if not isinstance(done, int):
            return str(done)
        settle()
    return "no failure"


@scenario()
def killed_with_data_in_flight(io: Io) -> None:
    """kill -9 of the sender right after its writes: everything it wrote arrives"""
    sender, receiver = io.pair()
    writer = os.fork()
    if not writer:
        sender.sendall(pattern(60_000))
        os.kill(os.getpid(), signal.SIGKILL)
    sender.close()
    os.waitpid(writer, 0)
    io.log("received", to_end(receiver))


@scenario()
def killed_while_receiving(io: Io) -> None:
    """kill -9 of the receiver in the middle of a stream"""
    sender, receiver = io.pair()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    reader = os.fork()
    if not reader:
        while receiver.recv(65_536):
            pass
    receiver.close()
    sender.sendall(b"x" * 1_000_000)
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    io.log("sends", sends_until_failure(sender) in {"EPIPE", "ECONNRESET"})


@scenario()
def reset_with_unread_data(io: Io) -> None:
    """The sender writes and aborts: the data can still be read, then ECONNRESET"""
    sender, receiver = io.pair()
    sender.sendall(b"last words")
    settle()
    abort(sender)
    settle()
    io.log("poll", poll_mask(receiver))
    io.log("recv", attempt(receiver.recv, 100))
    io.log("then", [attempt(receiver.recv, 100) for _ in range(2)])


@scenario()
def reset_then_send(io: Io) -> None:
    """Sending on a connection that was reset"""
    sender, receiver = io.pair()
    abort(receiver)
    settle()
    io.log("sends", [attempt(sender.send, b"x", socket.MSG_NOSIGNAL) for _ in range(3)])
    io.log("recv", attempt(sender.recv, 100))
    io.log("SO_ERROR", sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


@scenario()
def reset_error_option(io: Io) -> None:
    """SO_ERROR after a reset"""
    sender, receiver = io.pair()
    abort(sender)
    settle()
    io.log("SO_ERROR", receiver.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    io.log("SO_ERROR again", receiver.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    io.log("recv", attempt(receiver.recv, 100))


@scenario()
def send_after_peer_closed(io: Io) -> None:
    """Sending to a peer that has closed: it fails within a few writes"""
    sender, receiver = io.pair()
    receiver.close()
    settle()
    io.log("recv", attempt(sender.recv, 100))
    io.log("sends end with", sends_until_failure(sender) in {"EPIPE", "ECONNRESET"})


@scenario()
def linger(io: Io) -> None:
    """close with SO_LINGER on and a time-out: all arrives"""
    sender, receiver = io.pair()
    sender.sendall(pattern(30_000))
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
    sender.close()
    io.log("received", to_end(receiver))


@scenario(bypassed=False)
def close_before_accept(io: Io) -> None:
    """The client writes and closes before the server accepts"""
    listener = io.listener()
    client = socket.create_connection(listener.getsockname(), source_address=("127.0.0.6", 0))
    client.sendall(b"early bird")
    client.close()
    settle()
    server, _ = listener.accept()
    io.log("received", to_end(server))
    server.close()


@scenario(bypassed=None)
def many_short_connections(io: Io) -> None:
    """Two hundred connections with one request and one reply each"""
    failures = 0
    for number in range(200):
        sender, receiver = io.pair(greet=False)
        sender.sendall(b"request %d" % number)
        request = receiver.recv(100)
        receiver.sendall(request.upper())
        receiver.shutdown(socket.SHUT_WR)
        failures += to_end(sender) != [b"REQUEST %d" % number, "EOF"]
        for end in (sender, receiver):
            end.close()
    io.log("failures", failures)


@scenario()
def descriptor_closed_while_peer_waits(io: Io) -> None:
    """close of a duplicate keeps the connection; close of the last one ends it"""
    sender, receiver = io.pair()
    twin = sender.dup()
    sender.close()
    io.log("readable", readable(receiver, SETTLE_S))
    twin.sendall(b"still here")
    io.log("recv", receiver.recv(100))
    twin.close()
    io.log("readable then", readable(receiver, PATIENCE_S))
    io.log("recv then", receiver.recv(100))
