# SPDX-License-Identifier: Apache-2.0
"""Getting bytes out of a socket."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
import time

from tests.semantics.scenario import (
    OPTIONS,
    PATIENCE_S,
    SETTLE_S,
    Background,
    Io,
    Limit,
    attempt,
    exactly,
    libc,
    message_headers,
    or_error,
    readable,
    recv,
    scenario,
    settle,
    to_end,
)
from tests.semantics.scenarios.blocking import EXCLUDE


@scenario()
def several_writes_one_read(io: Io) -> None:
    """One recv takes what several writes sent"""
    sender, receiver = io.pair()
    for text in (b"one", b"two", b"three"):
        sender.sendall(text)
    settle()
    io.log("recv(100)", receiver.recv(100))


@scenario()
def reads_smaller_than_writes(io: Io) -> None:
    """Reads that are smaller than the writes and do not fit them"""
    sender, receiver = io.pair()
    sender.sendall(b"0123456789")
    sender.sendall(b"abcdefghij")
    settle()
    io.log("recv(7), three times", [receiver.recv(7) for _ in range(3)])


@scenario()
def scattered_read(io: Io) -> None:
    """readv and recvmsg into several buffers"""
    sender, receiver = io.pair()
    sender.sendall(b"0123456789" * 3)
    settle()
    first, second, third = bytearray(4), bytearray(1), bytearray(10)
    io.log("readv", os.readv(receiver.fileno(), [first, second]))
    io.log("recvmsg", receiver.recvmsg_into([third, first])[0])
    io.log("buffers", [first, second, third])


@scenario()
def several_messages_one_call(io: Io) -> None:
    """recvmmsg"""
    sender, receiver = io.pair()
    sender.sendall(b"0123456789")
    settle()
    buffers = [ctypes.create_string_buffer(4) for _ in range(4)]
    got = libc.recvmmsg(receiver.fileno(), message_headers(buffers), 4, socket.MSG_DONTWAIT, None)
    io.log("messages", got)
    io.log("bytes", b"".join(buffer.raw for buffer in buffers[:got]).rstrip(b"\0"))


@scenario()
def peek(io: Io) -> None:
    """MSG_PEEK, of less and of more than there is"""
    sender, receiver = io.pair()
    sender.sendall(b"0123456789")
    sender.sendall(b"abc")
    settle()
    io.log("peek 4", receiver.recv(4, socket.MSG_PEEK))
    io.log("peek 100", receiver.recv(100, socket.MSG_PEEK))
    io.log("recv", receiver.recv(100))
    io.log("peek of nothing", recv(receiver, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT))


@scenario()
def peek_offset(io: Io) -> None:
    """SO_PEEK_OFF: each MSG_PEEK goes on where the last one ended"""
    sender, receiver = io.pair()
    if isinstance(attempt(receiver.setsockopt, socket.SOL_SOCKET, OPTIONS["SO_PEEK_OFF"], 0), str):
        io.log("SO_PEEK_OFF", "not on this kernel")
        return
    sender.sendall(b"0123456789")
    settle()
    io.log("peek 3, twice", [receiver.recv(3, socket.MSG_PEEK) for _ in range(2)])


@scenario()
def wait_for_all(io: Io) -> None:
    """MSG_WAITALL, the bytes arriving in two writes"""
    sender, receiver = io.pair()
    reader = Background(receiver.recv, 10, socket.MSG_WAITALL)
    settle()
    sender.sendall(b"01234")
    settle()
    sender.sendall(b"56789")
    io.log("recv(10, MSG_WAITALL)", reader.result())


@scenario()
def wait_for_all_that_is_there(io: Io) -> None:
    """MSG_WAITALL when everything has already arrived"""
    sender, receiver = io.pair()
    sender.sendall(b"01234")
    sender.sendall(b"56789")
    settle()
    io.log("recv(10, MSG_WAITALL)", receiver.recv(10, socket.MSG_WAITALL))


@scenario(bypassed=None)
def wait_for_all_over_the_switch(io: Io) -> None:
    """MSG_WAITALL whose reader already waits when the other direction starts to speak"""
    sender, receiver = io.pair(greet=False)
    reader = Background(exactly_waitall, receiver, 30)
    settle()
    for _ in range(3):
        sender.sendall(b"0123456789")
        settle()
        receiver.sendall(b"ok")
    io.log("all of it", reader.result())
    io.log("answers", exactly(sender, 6))


def exactly_waitall(sock: socket.socket, size: int) -> bytes:
    """Reads with MSG_WAITALL until it has all, as a program does that knows of short reads."""
    data = b""
    while len(data) < size:
        data += sock.recv(size - len(data), socket.MSG_WAITALL)
    return data


@scenario()
def low_water_mark(io: Io) -> None:
    """SO_RCVLOWAT: asleep until enough has arrived"""
    sender, receiver = io.pair()
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 10)
    reader = Background(receiver.recv, 100)
    settle()  # one that came later would find bytes, and sleep past the mark: plain TCP does that
    sender.sendall(b"01234")
    settle()
    io.log("after 5 bytes", reader.result(SETTLE_S))
    sender.sendall(b"56789")
    io.log("after 10 bytes", reader.result())


@scenario()
def low_water_mark_polled(io: Io) -> None:
    """SO_RCVLOWAT and poll"""
    sender, receiver = io.pair()
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 10)
    sender.sendall(b"01234")
    settle()
    io.log("readable after 5 bytes", readable(receiver, SETTLE_S))
    sender.sendall(b"56789")
    io.log("readable after 10 bytes", readable(receiver))
    io.log("recv", receiver.recv(100))


@scenario(
    Limit(
        "recv(MSG_TRUNC), which throws bytes away on TCP, copies them: EFAULT without a buffer",
        EXCLUDE,
    )
)
def discard(io: Io) -> None:
    """MSG_TRUNC without a buffer throws bytes away"""
    sender, receiver = io.pair()
    sender.sendall(b"0123456789")
    settle()
    got = libc.recv(receiver.fileno(), None, 4, socket.MSG_TRUNC)
    io.log("recv(NULL, 4, MSG_TRUNC)", or_error(got))
    io.log("what is left", receiver.recv(100))


@scenario(
    Limit(
        "recv of 0 bytes on an empty socket returns 0 at once instead of waiting or EAGAIN",
        "nothing: programs do not ask for 0 bytes",
    )
)
def zero_bytes(io: Io) -> None:
    """recv of 0 bytes, with nothing there and with something"""
    sender, receiver = io.pair()
    io.log("nothing there", recv(receiver, 0, socket.MSG_DONTWAIT))
    sender.sendall(b"0123456789")
    settle()
    io.log("something there", recv(receiver, 0, socket.MSG_DONTWAIT))
    io.log("recv(100)", receiver.recv(100))


@scenario()
def nonblocking(io: Io) -> None:
    """A non-blocking reader"""
    sender, receiver = io.pair()
    receiver.setblocking(False)
    io.log("empty", attempt(receiver.recv, 100))
    sender.sendall(b"data")
    settle()
    io.log("data", attempt(receiver.recv, 100))
    io.log("empty again", attempt(receiver.recv, 100))
    sender.close()
    settle()
    io.log("end", attempt(receiver.recv, 100))


@scenario()
def receive_timeout(io: Io) -> None:
    """SO_RCVTIMEO with nothing to read"""
    _, receiver = io.pair()
    duration = 4 * SETTLE_S
    set_timeout(receiver, socket.SO_RCVTIMEO, duration)
    began = time.monotonic()
    io.log("recv", recv(receiver, 10))
    took = time.monotonic() - began
    io.log("waited", "long enough" if took >= 0.9 * duration else "too short")


@scenario()
def receive_timeout_of_wait_for_all(io: Io) -> None:
    """SO_RCVTIMEO and MSG_WAITALL, half of the bytes there"""
    sender, receiver = io.pair()
    sender.sendall(b"01234")
    settle()
    duration = 4 * SETTLE_S
    set_timeout(receiver, socket.SO_RCVTIMEO, duration)
    began = time.monotonic()
    io.log("recv(10, MSG_WAITALL)", recv(receiver, 10, socket.MSG_WAITALL))
    io.log("waited for more", time.monotonic() - began >= 0.9 * duration)


def set_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """SO_RCVTIMEO or SO_SNDTIMEO."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, option, value)


SPLICE = Limit(
    "On bypassed sockets splice(2) says EINVAL. Where the kernel does not let us refuse it, as "
    "here, it says EAGAIN: `proxy-only`",
    "see above; where full is forced, exclude the port",
)


@scenario(SPLICE)
def splice_from(io: Io) -> None:
    """splice from a non-blocking socket to a pipe"""
    sender, receiver = io.pair()
    sender.sendall(b"0123456789")
    settle()
    receiver.setblocking(False)
    out, into = os.pipe()
    moved = libc.splice(receiver.fileno(), None, into, None, 100, SPLICE_F_NONBLOCK)
    io.log("moved", or_error(moved))
    os.close(into)
    io.log("in the pipe", os.read(out, 100))
    os.close(out)
    io.log("left in the socket", attempt(receiver.recv, 100))


SPLICE_F_NONBLOCK = 2


@scenario(SPLICE, bypassed=None)
def spliced_through(io: Io) -> None:
    """A proxy that reads a request with recv and splices what follows, waiting by poll"""
    sender, receiver = io.pair()
    settle()  # they may join
    sender.sendall(b"request")
    io.log("request", exactly(receiver, 7))
    receiver.setblocking(False)
    out, into = os.pipe()
    moved = 0
    for _ in range(10):
        sender.sendall(b"0123456789")
        if readable(receiver):
            step = libc.splice(receiver.fileno(), None, into, None, 100, SPLICE_F_NONBLOCK)
            if step < 0 and ctypes.get_errno() == errno.EINVAL:  # Go and HAProxy then read
                step = os.write(into, receiver.recv(100))
            moved += max(step, 0)
    io.log("all moved", moved == 100)
    os.close(into)
    os.close(out)


@scenario()
def peek_until_there(io: Io) -> None:
    """MSG_PEEK until three hundred one-byte writes are there, as a sidecar's listener does"""
    sender, receiver = io.pair()
    sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(300):
        sender.sendall(b"p")
    seen = 0
    deadline = time.monotonic() + PATIENCE_S
    while seen < 300 and time.monotonic() < deadline:
        there = recv(receiver, 1000, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        seen = len(there) if isinstance(there, bytes) else 0
        time.sleep(SETTLE_S / 10)
    io.log("seen", seen)
    io.log("read", exactly(receiver, 300) == b"p" * 300)


@scenario()
def sendfile_from(io: Io) -> None:
    """The socket as the source of copy_file_range and sendfile, which TCP refuses as well"""
    sender, receiver = io.pair()
    sender.sendall(b"0123456789")
    settle()
    with open(os.memfd_create("sink"), "wb") as sink:  # noqa: PTH123 - a descriptor
        io.log("sendfile", attempt(os.sendfile, sink.fileno(), receiver.fileno(), None, 5))
    io.log("recv", receiver.recv(100))


@scenario()
def out_of_band(io: Io) -> None:
    """MSG_OOB: the urgent byte, its mark and POLLPRI"""
    sender, receiver = io.pair()
    sender.sendall(b"before")
    sender.send(b"!", socket.MSG_OOB)
    sender.sendall(b"after")
    settle()
    io.log("first read", receiver.recv(100))
    io.log("urgent byte", recv(receiver, 1, socket.MSG_OOB | socket.MSG_DONTWAIT))
    io.log("the rest", recv(receiver, 100, socket.MSG_DONTWAIT))


@scenario()
def out_of_band_inline(io: Io) -> None:
    """MSG_OOB with SO_OOBINLINE: no byte lost, no byte out of order"""
    sender, receiver = io.pair()
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    sender.sendall(b"before")
    sender.send(b"!", socket.MSG_OOB)
    sender.sendall(b"after")
    sender.shutdown(socket.SHUT_WR)
    io.log("all of it", to_end(receiver))


@scenario(
    Limit(
        "TCP_ZEROCOPY_RECEIVE maps nothing although the socket is readable, or gets later bytes "
        "first",
        EXCLUDE,
    )
)
def zerocopy_receive(io: Io) -> None:
    """TCP_ZEROCOPY_RECEIVE, or the hint to copy instead"""
    sender, receiver = io.pair()
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, 65536, mmap.PROT_READ, mmap.MAP_SHARED, receiver.fileno(), 0)
    sender.sendall(b"x" * 1000)
    settle()
    # struct tcp_zerocopy_receive: address, length, recv_skip_hint
    argument = ctypes.create_string_buffer(struct.pack("QII", address, 65536, 0), 16)
    failed = libc.getsockopt(
        *(receiver.fileno(), socket.IPPROTO_TCP, OPTIONS["TCP_ZEROCOPY_RECEIVE"]),
        *(argument, ctypes.byref(ctypes.c_uint32(16))),
    )
    _, mapped, to_copy = struct.unpack("QII", argument.raw)
    io.log("getsockopt", errno.errorcode[ctypes.get_errno()] if failed else "done")
    io.log("bytes mapped, bytes to be copied", [mapped, to_copy])
    io.log("recv", recv(receiver, 2000, socket.MSG_DONTWAIT))


@scenario()
def socket_filter(io: Io) -> None:
    """SO_ATTACH_FILTER by the receiver, of a filter that drops every packet, and its end"""
    sender, receiver = io.pair()
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))  # BPF_RET, 0 bytes
    program = struct.pack("HP", 1, ctypes.addressof(drop_all))  # struct sock_fprog
    receiver.setsockopt(socket.SOL_SOCKET, OPTIONS["SO_ATTACH_FILTER"], program)
    sender.sendall(b"dropped")
    settle()
    io.log("received", recv(receiver, 100, socket.MSG_DONTWAIT))
    receiver.setsockopt(socket.SOL_SOCKET, OPTIONS["SO_DETACH_FILTER"], 0)
    io.log("sent again", exactly(receiver, len(b"dropped")))


@scenario()
def receive_timestamps(io: Io) -> None:
    """Receive time stamps (SO_TIMESTAMPNS), asked for on an established connection"""
    sender, receiver = io.pair()
    receiver.setsockopt(socket.SOL_SOCKET, OPTIONS["SO_TIMESTAMPNS"], 1)
    settle()  # the kernel begins to take time stamps a moment later
    received_with_control(io, sender, receiver)


@scenario(
    Limit(
        "With TCP_INQ, no control message tells how many bytes are still unread; gRPC then reads "
        "again, as it does on kernels without it",
        "nothing",
    )
)
def bytes_in_queue(io: Io) -> None:
    """TCP_INQ: each recvmsg tells how many bytes are left"""
    sender, receiver = io.pair()
    receiver.setsockopt(socket.IPPROTO_TCP, OPTIONS["TCP_INQ"], 1)
    received_with_control(io, sender, receiver)


def received_with_control(io: Io, sender: socket.socket, receiver: socket.socket) -> None:
    sender.sendall(b"0123456789")
    settle()
    data, control, _, _ = receiver.recvmsg(4, 200)
    io.log("recvmsg", data)
    io.log("control messages", sorted(f"{level}/{kind}" for level, kind, _ in control))


@scenario()
def error_queue(io: Io) -> None:
    """MSG_ERRQUEUE of a socket without errors"""
    sender, receiver = io.pair()
    sender.sendall(b"data")
    settle()
    receiver.setblocking(False)
    io.log("recvmsg", attempt(receiver.recvmsg, 10, 100, socket.MSG_ERRQUEUE))
    io.log("recv", receiver.recv(100))


@scenario()
def one_byte_at_a_time(io: Io) -> None:
    """A thousand reads of one byte"""
    sender, receiver = io.pair()
    sender.sendall(bytes(index % 251 for index in range(1000)))
    io.log("bytes", b"".join(receiver.recv(1) for _ in range(1000)))


@scenario()
def reader_later_than_writer(io: Io) -> None:
    """The writer has long closed when the reader comes"""
    sender, receiver = io.pair()
    sender.sendall(b"x" * 50_000)
    sender.close()
    settle()
    readable(receiver, PATIENCE_S)
    io.log("read", to_end(receiver))
