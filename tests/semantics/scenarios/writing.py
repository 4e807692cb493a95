# SPDX-License-Identifier: Apache-2.0
"""Getting bytes into a socket."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import select
import signal
import socket
import tempfile
import time

from tests.semantics.scenario import (
    OPTIONS,
    PATIENCE_S,
    SETTLE_S,
    Background,
    Io,
    Limit,
    Value,
    acquaint,
    as_before,
    attempt,
    exactly,
    exactly_by_poll,
    libc,
    mask_names,
    message_headers,
    or_error,
    pattern,
    poll_mask,
    recv,
    scenario,
    settle,
    to_end,
)
from tests.semantics.scenarios.reading import set_timeout

MSG_ZEROCOPY = 0x4000000
MEBIBYTE = 1 << 20


@scenario()
def gathered_write(io: Io) -> None:
    """writev and sendmsg from several buffers"""
    sender, receiver = io.pair()
    io.log("writev", os.writev(sender.fileno(), [b"abc", b"", b"defgh"]))
    io.log("sendmsg", sender.sendmsg([b"1", b"23", b"456"]))
    settle()
    io.log("received", receiver.recv(100))


@scenario()
def several_messages_sent(io: Io) -> None:
    """sendmmsg"""
    sender, receiver = io.pair()
    texts = [ctypes.create_string_buffer(text, len(text)) for text in (b"one", b"two", b"three")]
    io.log("sendmmsg", libc.sendmmsg(sender.fileno(), message_headers(texts), 3, 0))
    settle()
    io.log("received", receiver.recv(100))


LARGE, SMALL = 200_000, 1_000


@scenario(bypassed=False)
def messages_that_do_not_fit(io: Io) -> None:
    """sendmmsg into a full send buffer, MSG_DONTWAIT: no message follows one taken in part"""
    sender, receiver = ends = io.pair(greet=False)
    both = [ctypes.create_string_buffer(text, len(text)) for text in (b"one", b"two")]
    acquaint(ends, lambda: libc.sendmmsg(sender.fileno(), message_headers(both), 2, 0), 6)
    reader = Background(to_end, receiver)
    texts = [ctypes.create_string_buffer(size) for size in (LARGE, SMALL)]
    headers = message_headers(texts)
    lengths = [ctypes.c_uint32.from_buffer(headers, at) for at in (56, 120)]
    in_part = followed = 0
    deadline = time.monotonic() + PATIENCE_S
    while in_part < 100 and time.monotonic() < deadline:
        sent = libc.sendmmsg(sender.fileno(), headers, 2, socket.MSG_DONTWAIT)
        if sent < 0:
            select.select([], [sender], [], PATIENCE_S)
        elif lengths[0].value < LARGE:
            in_part += 1
            followed += sent > 1
    sender.close()
    reader.result()
    io.log("some were taken in part", in_part > 0)
    io.log("and followed by the next", followed)


@scenario()
def one_byte_writes(io: Io) -> None:
    """Two thousand writes of one byte each"""
    sender, receiver = io.pair()
    data = pattern(2000)
    reader = Background(to_end, receiver)
    for byte in data:
        sender.sendall(bytes([byte]))
    sender.close()
    io.log("received", reader.result())


@scenario()
def mixed_sizes(io: Io) -> None:
    """Writes from 1 byte to 300 KB, one after the other"""
    sender, receiver = io.pair()
    reader = Background(to_end, receiver)
    data = pattern(1_200_000)
    position = 0
    for size in (1, 300_000, 17, 65_536, 4096, 200_000, 1, 1, 131_072):
        sender.sendall(data[position : position + size])
        position += size
    sender.close()
    io.log("sent", position)
    io.log("received", reader.result())


@scenario()
def sixteen_mebibytes(io: Io) -> None:
    """One write of 16 MB to a reader that keeps up"""
    sender, receiver = io.pair()
    reader = Background(to_end, receiver)
    data = pattern(MEBIBYTE) * 16
    sender.sendall(data)
    sender.close()
    io.log("received", reader.result(4 * PATIENCE_S))


@scenario()
def sixteen_mebibytes_to_a_late_reader(io: Io) -> None:
    """One write of 16 MB to a reader that comes late: it blocks, then goes on"""
    sender, receiver = io.pair()
    writer = Background(sender.sendall, pattern(MEBIBYTE) * 16)
    settle()
    io.log("writer", writer.result(SETTLE_S))
    io.log("received", hashlib.sha1(exactly(receiver, 16 * MEBIBYTE)).hexdigest()[:8])
    io.log("writer then", writer.result())


@scenario()
def stalled_reader(io: Io) -> None:
    """A non-blocking writer is stopped by a reader that does not read, and nothing is lost"""
    sender, receiver = io.pair()
    sender.setblocking(False)
    sent = 0
    stopped: object = "never"
    while sent < 64 * MEBIBYTE:
        done = attempt(sender.send, b"s" * 65_536)
        if not isinstance(done, int):
            stopped = done
            break
        sent += done
    io.log("stopped by", stopped)
    as_before(sender)
    sender.shutdown(socket.SHUT_WR)
    data, end = to_end(receiver)
    io.log("lost", sent - len(data) if isinstance(data, bytes) else 0)
    io.log("end", end)


@scenario()
def writable_again(io: Io) -> None:
    """EPOLLOUT, edge-triggered, once a stalled reader has read"""
    sender, receiver = io.pair()
    sender.setblocking(False)
    with select.epoll() as poller:
        poller.register(sender, select.EPOLLOUT | select.EPOLLET)
        io.log("at first", [mask_names(mask) for _, mask in poller.poll(PATIENCE_S)])
        sent = 0
        while isinstance(done := attempt(sender.send, b"s" * 65_536), int) and sent < 64 * MEBIBYTE:
            sent += done
        io.log("stalled", [mask_names(mask) for _, mask in poller.poll(SETTLE_S)])
        exactly(receiver, sent)
        io.log("drained", [mask_names(mask) for _, mask in poller.poll(PATIENCE_S)])


@scenario()
def send_timeout(io: Io) -> None:
    """SO_SNDTIMEO against a reader that does not read"""
    sender, _ = io.pair()
    set_timeout(sender, socket.SO_SNDTIMEO, 2 * SETTLE_S)
    data = b"s" * MEBIBYTE
    for _ in range(64):
        sent = libc.send(sender.fileno(), data, len(data), 0)
        if sent < 0:
            break
    io.log("send", errno.errorcode[ctypes.get_errno()] if sent < 0 else "never times out")


@scenario()
def sendfile_to(io: Io) -> None:
    """sendfile to the socket"""
    sender, receiver = io.pair()
    reader = Background(to_end, receiver)
    with tempfile.TemporaryFile() as file:
        file.write(pattern(300_000))
        file.flush()
        position = 0
        while position < 300_000:
            wait_for_room(sender)
            position += os.sendfile(sender.fileno(), file.fileno(), position, 300_000 - position)
    sender.close()
    io.log("received", reader.result())


def wait_for_room(sock: socket.socket) -> None:
    """Waits for poll(2) to call it writable."""
    poller = select.poll()
    poller.register(sock, select.POLLOUT)
    poller.poll()


@scenario()
def splice_to(io: Io) -> None:
    """splice from a pipe to the socket"""
    sender, receiver = io.pair()
    out, into = os.pipe()
    os.write(into, pattern(20_000))
    os.close(into)
    moved = 0
    while (step := libc.splice(out, None, sender.fileno(), None, 65_536, 0)) > 0:
        moved += step
    os.close(out)
    sender.close()
    io.log("moved", moved)
    io.log("received", to_end(receiver))


@scenario(
    Limit(
        "Bytes sent with MSG_MORE arrive at once instead of being held back for up to 0.2 s; "
        "nothing is lost, a reader may be woken more often",
        "nothing; an application that corks (TCP_CORK) instead keeps such bytes together, on TCP",
    )
)
def more_to_come(io: Io) -> None:
    """MSG_MORE"""
    sender, receiver = io.pair()
    sender.send(b"first ", socket.MSG_MORE)
    io.log("before the rest", recv(receiver, 100, socket.MSG_DONTWAIT))
    sender.send(b"second")
    settle()
    io.log("with the rest", recv(receiver, 100, socket.MSG_DONTWAIT))


@scenario()
def corked(io: Io) -> None:
    """TCP_CORK"""
    sender, receiver = io.pair()
    sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    sender.sendall(b"first ")
    io.log("corked", recv(receiver, 100, socket.MSG_DONTWAIT))
    sender.sendall(b"second")
    sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    settle()
    io.log("uncorked", recv(receiver, 100, socket.MSG_DONTWAIT))


@scenario()
def corked_until_closed(io: Io) -> None:
    """Bytes under TCP_CORK, then close: all arrive, in order"""
    sender, receiver = io.pair()
    sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    for number in range(50):
        sender.sendall(b"%d," % number)
    sender.close()
    io.log("received", to_end(receiver))


@scenario(bypassed=None)  # a member without TCP_NODELAY that does not wait for answers leaves
def nagle_and_quickack(io: Io) -> None:
    """Small writes under every combination of TCP_NODELAY and TCP_QUICKACK"""
    for nodelay in (0, 1):
        for quickack in (0, 1):
            sender, receiver = io.pair()
            settle()  # they may join
            sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, nodelay)
            receiver.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, quickack)
            for number in range(100):
                sender.sendall(b"%d," % number)
            sender.close()
            io.log(f"nodelay {nodelay}, quickack {quickack}", to_end(receiver))


def zerocopy_completions(
    io: Io, sender: socket.socket, receiver: socket.socket, unread: bytes = b""
) -> None:
    """Sends with MSG_ZEROCOPY and looks for the completion that the sender must wait for.

    `unread` was sent before.
    """
    data = pattern(20_000)
    io.log("send", attempt(sender.send, data, MSG_ZEROCOPY))
    io.log("received intact", exactly(receiver, len(unread + data)) == unread + data)
    deadline = time.monotonic() + 10 * SETTLE_S
    while time.monotonic() < deadline:
        if "ERR" in poll_mask(sender):
            _, control, _, _ = sender.recvmsg(1, 200, socket.MSG_ERRQUEUE)
            # struct sock_extended_err: ee_origin is byte 4, SO_EE_ORIGIN_ZEROCOPY 5
            io.log("completion", control[0][2][4] == 5)
            return
        time.sleep(SETTLE_S / 10)
    io.log("completion", False)


@scenario(bypassed=False)
def zerocopy(io: Io) -> None:
    """MSG_ZEROCOPY with SO_ZEROCOPY set before the connection"""
    sender, receiver = io.pair(both={"SO_ZEROCOPY": 1})
    zerocopy_completions(io, sender, receiver)


@scenario()
def zerocopy_set_late(io: Io) -> None:
    """MSG_ZEROCOPY with SO_ZEROCOPY set on an established connection"""
    sender, receiver = io.pair()
    sender.sendall(b"unread")
    sender.setsockopt(socket.SOL_SOCKET, OPTIONS["SO_ZEROCOPY"], 1)
    zerocopy_completions(io, sender, receiver, b"unread")


@scenario()
def transmit_timestamp(io: Io) -> None:
    """SO_TIMESTAMPING: the time stamp of the acknowledgement"""
    sender, receiver = io.pair()
    tx_ack, software, opt_id, opt_tsonly = 1 << 9, 1 << 4, 1 << 7, 1 << 11
    flags = tx_ack | software | opt_id | opt_tsonly
    sender.sendall(b"unread")
    sender.setsockopt(socket.SOL_SOCKET, OPTIONS["SO_TIMESTAMPING"], flags)
    sender.sendall(b"data")
    exactly(receiver, len(b"unreaddata"))
    poller = select.poll()
    poller.register(sender, 0)
    io.log("time stamp", bool(poller.poll(10 * SETTLE_S * 1000)))


@scenario()
def broken_pipe(io: Io) -> None:
    """send after the own shutdown: EPIPE and SIGPIPE"""
    sender, receiver = io.pair()
    seen: list[Value] = []
    signal.signal(signal.SIGPIPE, lambda *_: seen.append("SIGPIPE"))
    sender.sendall(b"data")
    sender.shutdown(socket.SHUT_WR)
    io.log("send", attempt(sender.send, b"late"))
    io.log("signals", list(seen))
    io.log("send with MSG_NOSIGNAL", attempt(sender.send, b"late", socket.MSG_NOSIGNAL))
    io.log("signals then", list(seen))
    io.log("received", to_end(receiver))


@scenario(
    Limit(
        "send from memory that is not mapped returns 0 instead of EFAULT",
        "nothing: such a program is broken either way",
    )
)
def bad_address(io: Io) -> None:
    """send from and recv to memory that is not mapped; the stream goes on unharmed"""
    sender, receiver = io.pair()
    unmapped = ctypes.c_void_p(8)
    io.log("send", or_error(libc.send(sender.fileno(), unmapped, 100, 0)))
    sender.sendall(b"0123456789")
    settle()
    io.log("recv", or_error(libc.recv(receiver.fileno(), unmapped, 100, 0)))
    io.log("received", recv(receiver, 100, socket.MSG_DONTWAIT))


@scenario()
def both_directions_at_once(io: Io) -> None:
    """4 MB each way at the same time, four threads, the readers using poll"""
    sender, receiver = io.pair()
    there, back = pattern(4 * MEBIBYTE), pattern(5 * MEBIBYTE)[MEBIBYTE:]
    readers = [Background(exactly_by_poll, sock, 4 * MEBIBYTE) for sock in (sender, receiver)]
    writers = [Background(sender.sendall, there), Background(receiver.sendall, back)]
    io.log("writers", [writer.result(4 * PATIENCE_S) for writer in writers])
    io.log("read by the sender, by the receiver", [reader.result() for reader in readers])
