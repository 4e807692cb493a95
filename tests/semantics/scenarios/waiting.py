# SPDX-License-Identifier: Apache-2.0
"""Being told that there is something to do."""

from __future__ import annotations

import fcntl
import functools
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from tests.semantics.scenario import (
    PATIENCE_S,
    SETTLE_S,
    Background,
    Io,
    Value,
    abort,
    acquaint,
    attempt,
    exactly,
    exactly_by_poll,
    mask_names,
    pattern,
    poll_mask,
    scenario,
    settle,
)
from tests.semantics.uring import Ring, RingUnavailable


@scenario()
def polled(io: Io) -> None:
    """poll: before, with and after data"""
    sender, receiver = io.pair()
    io.log("nothing there", poll_mask(receiver))
    waiting = Background(wait_for_input, receiver)
    settle()
    sender.sendall(b"data")
    io.log("a poll that waited", waiting.result())
    io.log("some read", receiver.recv(2))
    io.log("some left", poll_mask(receiver))
    io.log("all read", receiver.recv(2))
    io.log("nothing left", poll_mask(receiver))


def wait_for_input(sock: socket.socket) -> str:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return mask_names(dict(poller.poll(PATIENCE_S * 1000)).get(sock.fileno(), 0))


@scenario()
def selected(io: Io) -> None:
    """select, waiting and with data there"""
    sender, receiver = io.pair()
    waiting = Background(select.select, [receiver], [], [], PATIENCE_S)
    settle()
    sender.sendall(b"data")
    io.log("woken", len(waiting.result()[0]))
    io.log("data there", len(select.select([receiver], [], [], 0)[0]))
    receiver.recv(100)
    io.log("data read", len(select.select([receiver], [], [], 0)[0]))


def events(poller: select.epoll, timeout_s: float = SETTLE_S) -> list[Value]:
    return [mask_names(mask) for _, mask in poller.poll(timeout_s)]


@scenario()
def epoll_level(io: Io) -> None:
    """epoll, level-triggered, reading part of the data"""
    sender, receiver = io.pair()
    with select.epoll() as poller:
        poller.register(receiver, select.EPOLLIN)
        io.log("nothing", events(poller))
        sender.sendall(b"0123456789")
        io.log("data", events(poller, PATIENCE_S))
        receiver.recv(5)
        io.log("half of it read", events(poller, PATIENCE_S))
        receiver.recv(5)
        io.log("all of it read", events(poller))


@scenario()
def epoll_edge(io: Io) -> None:
    """epoll, edge-triggered: one event per arrival, none for what is left"""
    sender, receiver = io.pair()
    with select.epoll() as poller:
        poller.register(receiver, select.EPOLLIN | select.EPOLLET)
        io.log("nothing", events(poller))
        for number in range(3):
            sender.sendall(b"0123456789")
            io.log(f"arrival {number}", events(poller, PATIENCE_S))
            receiver.recv(5)
            io.log(f"half of it read {number}", events(poller))


@scenario()
def epoll_edge_ping_pong(io: Io) -> None:
    """epoll, edge-triggered, 200 round trips between two event loops"""
    sender, receiver = io.pair()
    sender.setblocking(False)
    receiver.setblocking(False)
    echo = Background(edge_loop, receiver, 200, False)
    io.log("asker", edge_loop(sender, 200, True))
    io.log("echo", echo.result())


def edge_loop(sock: socket.socket, rounds: int, first: bool) -> str:
    """Reads until EAGAIN at each edge, answers each message; returns how far it came."""
    with select.epoll() as poller:
        poller.register(sock, select.EPOLLIN | select.EPOLLET)
        if first:
            sock.send(b"ping")
        done = 0
        while done < rounds:
            if not poller.poll(PATIENCE_S):
                return f"no event after {done} rounds"
            while isinstance(data := attempt(sock.recv, 100), bytes):
                done += 1
                if done < rounds or not first:
                    sock.send(data)
    return f"{done} rounds"


@scenario()
def event_taken_not_read(io: Io) -> None:
    """epoll, edge-triggered: two events taken, then one read that takes what there is"""
    sender, receiver = io.pair()
    with select.epoll() as poller:
        poller.register(receiver, select.EPOLLIN | select.EPOLLET)
        for number in range(2):
            sender.sendall(b"%d" % number * 50)
            io.log(f"event {number}", events(poller, PATIENCE_S))
        io.log("read", receiver.recv(4096))
        sender.sendall(b"more")
        io.log("event then", events(poller, PATIENCE_S))
        io.log("read then", receiver.recv(4096))


@scenario()
def edge_reader_that_rested(io: Io) -> None:
    """epoll, edge-triggered, each short read taken for the end, behind a sender that was stopped"""
    sender, receiver = io.pair()
    sender.setblocking(False)
    sent = 0
    while isinstance(done := attempt(sender.send, b"s" * 5000), int) and sent < LARGE:
        sent += done
    received, longest_s = 0, 0.0
    with select.epoll() as poller:
        poller.register(receiver, select.EPOLLIN | select.EPOLLET)
        has_more = bool(poller.poll(PATIENCE_S))
        time.sleep(REST_S)
        while has_more:
            while len(data := receiver.recv(70_000)) == 70_000:
                received += len(data)
            received += len(data)
            began = time.monotonic()
            has_more = received < sent and bool(poller.poll(PATIENCE_S))
            longest_s = max(longest_s, time.monotonic() - began)
    io.log("missing", sent - received)
    io.log("later than 1.5 s", longest_s > 1.5)


LARGE = 64 << 20
REST_S = 3.0


@scenario()
def epoll_oneshot(io: Io) -> None:
    """EPOLLONESHOT: one event until it is armed again"""
    sender, receiver = io.pair()
    with select.epoll() as poller:
        poller.register(receiver, select.EPOLLIN | select.EPOLLONESHOT)
        sender.sendall(b"first")
        io.log("first", events(poller, PATIENCE_S))
        sender.sendall(b"second")
        io.log("not armed", events(poller))
        poller.modify(receiver, select.EPOLLIN | select.EPOLLONESHOT)
        io.log("armed again", events(poller, PATIENCE_S))


@scenario()
def epoll_exclusive(io: Io) -> None:
    """EPOLLEXCLUSIVE: two event loops watch one connection"""
    sender, receiver = io.pair()
    with select.epoll() as one, select.epoll() as other:
        for poller in (one, other):
            poller.register(receiver, select.EPOLLIN | select.EPOLLEXCLUSIVE)
        sender.sendall(b"data")
        settle()
        io.log("woken at least once", bool(events(one) or events(other)))


@scenario()
def epoll_end_of_stream(io: Io) -> None:
    """EPOLLRDHUP and EPOLLIN when the sender shuts down after data"""
    sender, receiver = io.pair()
    with select.epoll() as poller:
        poller.register(receiver, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        sender.sendall(b"last words")
        sender.shutdown(socket.SHUT_WR)
        settle()
        io.log("data and end", events(poller, PATIENCE_S))
        io.log("read", [receiver.recv(100), receiver.recv(100)])
        io.log("after the end", poll_mask(receiver))


@scenario()
def epoll_reset(io: Io) -> None:
    """EPOLLERR and EPOLLHUP when the sender aborts"""
    sender, receiver = io.pair()
    with select.epoll() as poller:
        poller.register(receiver, select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET)
        abort(sender)
        settle()
        io.log("events", events(poller, PATIENCE_S))


@scenario()
def signal_driven(io: Io) -> None:
    """O_ASYNC: SIGIO for data"""
    sender, receiver = io.pair()
    seen: list[Value] = []
    signal.signal(signal.SIGIO, lambda *_: seen.append("SIGIO"))
    fcntl.fcntl(receiver, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(receiver, fcntl.F_SETFL, fcntl.fcntl(receiver, fcntl.F_GETFL) | os.O_ASYNC)
    sender.sendall(b"data")
    settle()
    io.log("signalled", "SIGIO" in seen)
    io.log("read", receiver.recv(100))


Play = Callable[[Io, Ring, socket.socket, socket.socket], None]


def on_a_ring(*, greet: bool = True) -> Callable[[Play], Callable[[Io], None]]:
    """A scenario of sender and receiver with a ring; it says so where the kernel has none."""

    def on_one(play: Play) -> Callable[[Io], None]:
        @functools.wraps(play)
        def played(io: Io) -> None:
            sender, receiver = io.pair(greet=greet)
            try:
                ring = Ring()
            except RingUnavailable as error:
                io.log("io_uring", str(error))
                return
            with ring:
                play(io, ring, sender, receiver)

        return played

    return on_one


@scenario()
@on_a_ring()
def io_uring_receive(io: Io, ring: Ring, sender: socket.socket, receiver: socket.socket) -> None:
    """io_uring: a receive that waits, one with data there, and MSG_WAITALL in two writes"""
    waiting = ring.recv(receiver.fileno(), 100)
    io.log("before data", ring.completion(SETTLE_S))
    sender.sendall(b"0123456789")
    io.log("completion", ring.completion(PATIENCE_S))
    io.log("bytes", waiting.raw[:10])
    sender.sendall(b"abcde")
    settle()
    there = ring.recv(receiver.fileno(), 3)
    io.log("data there", ring.completion(PATIENCE_S))
    io.log("its bytes", there.raw[:3])
    exactly(receiver, 2)
    whole = ring.recv(receiver.fileno(), 10, socket.MSG_WAITALL)
    for part in (b"01234", b"56789"):
        sender.sendall(part)
        settle()
    io.log("MSG_WAITALL", ring.completion(PATIENCE_S))
    io.log("its bytes then", whole.raw[:10])


@scenario()
@on_a_ring()
def io_uring_worker(io: Io, ring: Ring, sender: socket.socket, receiver: socket.socket) -> None:
    """io_uring: receives made by a thread of the kernel (IOSQE_ASYNC), five times"""
    for number in range(5):
        waiting = ring.recv(receiver.fileno(), 100, by_worker=True)
        settle()
        sender.sendall(b"message %d" % number)
        result = ring.completion(PATIENCE_S)
        io.log(f"completion {number}", result)
        io.log(f"bytes {number}", waiting.raw[: max(result or 0, 0)])


@scenario()
@on_a_ring()
def io_uring_send(io: Io, ring: Ring, sender: socket.socket, receiver: socket.socket) -> None:
    """io_uring: sends"""
    for number in range(3):
        ring.send(sender.fileno(), b"message %d" % number)
        io.log(f"completion {number}", ring.completion(PATIENCE_S))
    io.log("received", exactly_by_poll(receiver, 27))


def send_whole(
    io: Io, ring: Ring, sender: socket.socket, receiver: socket.socket, *, by_worker: bool
) -> None:
    """Small sends and a large one."""
    data = pattern(8 << 20)

    def send() -> None:
        ring.send(sender.fileno(), b"question", by_worker=by_worker)
        io.log("completion", ring.completion(PATIENCE_S))

    acquaint((sender, receiver), send, 8)
    reader = Background(exactly_by_poll, receiver, len(data))
    ring.send(sender.fileno(), data, socket.MSG_WAITALL, by_worker)
    io.log("whole", ring.completion(PATIENCE_S))
    io.log("received", reader.result())


@scenario(bypassed=False)
@on_a_ring(greet=False)
def io_uring_send_whole(io: Io, ring: Ring, sender: socket.socket, receiver: socket.socket) -> None:
    """io_uring: sends from the first byte on, one with MSG_WAITALL larger than the send buffer"""
    send_whole(io, ring, sender, receiver, by_worker=False)


@scenario(bypassed=False)
@on_a_ring(greet=False)
def io_uring_worker_sends(
    io: Io, ring: Ring, sender: socket.socket, receiver: socket.socket
) -> None:
    """io_uring: the same sends, made by a thread of the kernel (IOSQE_ASYNC)"""
    send_whole(io, ring, sender, receiver, by_worker=True)


@scenario()
@on_a_ring()
def io_uring_poll(io: Io, ring: Ring, sender: socket.socket, receiver: socket.socket) -> None:
    """io_uring: a poll that waits for data"""
    ring.poll(receiver.fileno(), select.POLLIN)
    io.log("before data", ring.completion(SETTLE_S))
    sender.sendall(b"data")
    mask = ring.completion(PATIENCE_S)
    io.log("completion", mask_names(mask & select.POLLIN) if mask is not None else None)
