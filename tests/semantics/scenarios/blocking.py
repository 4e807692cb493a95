# SPDX-License-Identifier: Apache-2.0
"""A thread asleep in recv or send, and what wakes it other than data."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.semantics.scenario import (
    PATIENCE_S,
    SETTLE_S,
    Background,
    Io,
    Limit,
    abort,
    awaited,
    exactly,
    recv,
    scenario,
    settle,
)

EXCLUDE = "exclude the port"


@scenario()
def blocked_then_data(io: Io) -> None:
    """A blocked recv is woken by data, ten times"""
    sender, receiver = io.pair()
    for number in range(10):
        reader = Background(receiver.recv, 100)
        time.sleep(SETTLE_S / 5)
        sender.sendall(b"%d" % number)
        io.log(f"recv {number}", reader.result())


@scenario()
def blocked_then_end(io: Io) -> None:
    """A blocked recv is woken by the end of the stream"""
    sender, receiver = io.pair()
    reader = Background(receiver.recv, 100)
    settle()
    sender.close()
    io.log("recv", reader.result())


@scenario()
def blocked_then_reset(io: Io) -> None:
    """A blocked recv when the peer aborts"""
    sender, receiver = io.pair()
    reader = Background(awaited, receiver, 100)
    settle()
    abort(sender)
    io.log("recv", reader.result())
    io.log("recv again", recv(receiver, 100, socket.MSG_DONTWAIT))


@scenario()
def blocked_then_own_shutdown(io: Io) -> None:
    """A blocked recv when another thread calls shutdown(SHUT_RD)"""
    _, receiver = io.pair()
    reader = Background(awaited, receiver, 100)
    settle()
    receiver.shutdown(socket.SHUT_RD)
    io.log("recv", reader.result())
    io.log("recv again", recv(receiver, 100, socket.MSG_DONTWAIT))


@scenario()
def blocked_then_signal(io: Io) -> None:
    """A blocked recv when a signal comes whose handler asks for restart (SA_RESTART)"""
    sender, receiver = io.pair()
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, False)
    reader = threading.main_thread().ident or 0
    Background(signal_then_send, reader, sender)
    io.log("recv", awaited(receiver, 100))


def signal_then_send(thread: int, sender: socket.socket) -> None:
    settle()
    signal.pthread_kill(thread, signal.SIGUSR1)
    settle()
    sender.sendall(b"data")


@scenario()
def blocked_then_stopped(io: Io) -> None:
    """A blocked recv over SIGSTOP and SIGCONT (like a frozen cgroup, or strace attached)"""
    sender, receiver = io.pair()
    me = os.getpid()
    if not os.fork():
        settle()
        os.kill(me, signal.SIGSTOP)
        settle()
        os.kill(me, signal.SIGCONT)
        settle()
        sender.sendall(b"data")
        os._exit(0)
    io.log("recv", awaited(receiver, 100))
    os.wait()


@scenario()
def blocked_while_writer_stalls(io: Io) -> None:
    """A blocked recv while another thread of the process fills the same socket, and drains again"""
    sender, receiver = io.pair()
    reader = Background(awaited, sender, 100)
    size = 24 << 20
    writer = Background(sender.sendall, b"x" * size)
    settle()
    exactly(receiver, size)
    io.log("writer", writer.result())
    receiver.sendall(b"end")
    io.log("recv", reader.result())


@scenario()
def signals_at_1_khz(io: Io) -> None:
    """A reader that waits under a thousand signals a second (SA_RESTART), as profilers send"""
    sender, receiver = io.pair()
    with ticking():
        wrong = 0
        for number in range(20):
            Background(send_later, sender, b"%02d" % number)
            wrong += awaited(receiver, 100) != b"%02d" % number
    io.log("wrong", wrong)


@scenario(bypassed=None)
def toggled_per_request(io: Io) -> None:
    """O_NONBLOCK while idle, blocking while a request is read, under signals (gunicorn)"""
    toggling_reader(io, *io.pair(greet=False))


@scenario(
    Limit(
        "An event loop's socket that is made blocking after it has joined leaves with the next "
        "bytes; until then a signal or another thread can end its recv with EAGAIN",
        EXCLUDE,
    ),
    bypassed=None,
)
def toggled_late(io: Io) -> None:
    """The same, from some time after the connection was set up"""
    toggling_reader(io, *io.pair())


def toggling_reader(io: Io, sender: socket.socket, receiver: socket.socket) -> None:
    """Asks forty times; notes the first answer of recv that is wrong."""
    wrong = []
    with ticking():
        for number in range(40):
            receiver.setblocking(False)
            time.sleep(SETTLE_S / 20)
            receiver.setblocking(True)
            Background(send_later, sender, b"%02d" % number)
            read = recv(receiver, 100)
            if read != b"%02d" % number:
                wrong.append(read)
                break
            receiver.sendall(b"ok")
            exactly(sender, 2)
    io.log("wrong", wrong)


@scenario(bypassed=None)
def made_blocking_by_a_child(io: Io) -> None:
    """A child makes the inherited socket blocking, sleeps in recv, and reads all"""
    sender, receiver = io.pair()
    out, into = os.pipe()
    child = os.fork()
    if not child:
        receiver.setblocking(True)
        read = [recv(receiver, 100) for _ in range(5)]
        os.write(into, repr(read).encode())
        os._exit(0)
    for number in range(5):
        settle()
        sender.sendall(b"%d" % number)
    io.log("child", os.read(out, 1000))
    os.waitpid(child, 0)


@contextmanager
def ticking() -> Iterator[None]:
    """A signal each millisecond, whose handler asks for restart."""
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.siginterrupt(signal.SIGALRM, False)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def send_later(sender: socket.socket, data: bytes) -> None:
    time.sleep(SETTLE_S / 4)
    sender.sendall(data)


@scenario(bypassed=None)
def joins_under_readers(io: Io) -> None:
    """Both ends join while a thread reads at each, and writes go both ways"""
    sender, receiver = io.pair(greet=False)
    readers = [Background(exactly, sock, 3000) for sock in (sender, receiver)]
    for _ in range(300):
        sender.sendall(b"0123456789")
        receiver.sendall(b"9876543210")
        time.sleep(SETTLE_S / 50)
    io.log("read", [reader.result(PATIENCE_S) for reader in readers])


@scenario()
def blocked_writer_and_reset(io: Io) -> None:
    """A blocked send when the reader aborts"""
    sender, receiver = io.pair()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    writer = Background(sender.sendall, b"x" * (24 << 20))
    settle()
    abort(receiver)
    result = writer.result()
    io.log("send", result if result == "still blocked" else "failed")


@scenario()
def blocked_writer_and_close(io: Io) -> None:
    """A blocked send when the reader closes without having read"""
    sender, receiver = io.pair()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    writer = Background(sender.sendall, b"x" * (24 << 20))
    settle()
    receiver.close()
    result = writer.result()
    io.log("send", result if result == "still blocked" else "failed")


@scenario()
def two_threads_read_two_write(io: Io) -> None:
    """Full duplex with a blocked reader and a writer thread at each end"""
    sender, receiver = io.pair()
    readers = [Background(exactly, sock, 100_000) for sock in (sender, receiver)]
    for _ in range(100):
        sender.sendall(b"a" * 1000)
        receiver.sendall(b"b" * 1000)
    io.log("read", [reader.result(PATIENCE_S) for reader in readers])
