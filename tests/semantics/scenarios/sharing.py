# SPDX-License-Identifier: Apache-2.0
"""One socket, several processes."""

from __future__ import annotations

import array
import os
import socket

from tests.light import away_from_pods
from tests.semantics.scenario import Background, Io, exactly, pattern, scenario, settle, to_end


@scenario()
def forked_writer(io: Io) -> None:
    """Parent and child write to one socket in turn"""
    sender, receiver = io.pair()
    for number in range(5):
        child = os.fork()
        if not child:
            sender.sendall(b"child %d," % number)
            os._exit(0)
        os.waitpid(child, 0)
        sender.sendall(b"parent %d," % number)
    sender.close()
    io.log("received", to_end(receiver))


@scenario()
def forked_reader(io: Io) -> None:
    """A child goes on reading where the parent stopped"""
    sender, receiver = io.pair()
    sender.sendall(b"0123456789")
    io.log("parent", exactly(receiver, 4))
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.write(into, exactly(receiver, 3))
        os._exit(0)
    os.waitpid(child, 0)
    io.log("child", os.read(out, 100))
    sender.sendall(b"abc")
    io.log("parent again", exactly(receiver, 6))


@scenario()
def child_outlives_parent(io: Io) -> None:
    """The parent closes, the child still writes: no end of stream before the child's"""
    sender, receiver = io.pair()
    out, into = os.pipe()
    child = os.fork()
    if not child:
        os.read(out, 1)
        sender.sendall(b"from the child")
        os._exit(0)
    sender.close()
    settle()
    os.write(into, b"!")
    io.log("received", to_end(receiver))
    os.waitpid(child, 0)


@scenario()
def handed_to_another_cgroup(io: Io) -> None:
    """The socket is passed by SCM_RIGHTS to a process outside the pod, which goes on with it"""
    sender, receiver = io.pair()
    sender.sendall(b"before, ")
    here, there = socket.socketpair(socket.AF_UNIX)
    child = os.fork()
    if not child:
        sender.close()
        away_from_pods()
        _, control, _, _ = there.recvmsg(1, 100)
        descriptors = array.array("i")
        descriptors.frombytes(control[0][2])
        taken = socket.socket(fileno=descriptors[0])
        taken.sendall(b"after")
        answer = taken.recv(100)
        taken.sendall(answer.upper())
        os._exit(0)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sender.fileno()]))]
    here.sendmsg([b"!"], rights)
    sender.close()
    io.log("received", exactly(receiver, 13))
    receiver.sendall(b"answer")
    io.log("the rest", to_end(receiver))
    os.waitpid(child, 0)


@scenario()
def threads_take_turns(io: Io) -> None:
    """Eight threads write one after the other"""
    sender, receiver = io.pair()
    reader = Background(to_end, receiver)
    for number in range(8):
        Background(sender.sendall, b"%d" % number * 1000).result()
    sender.close()
    io.log("received", reader.result())


@scenario()
def threads_write_at_once(io: Io) -> None:
    """Four threads write messages of 512 bytes at once: none is torn"""
    sender, receiver = io.pair()
    writers = [
        Background(write_messages, sender, bytes([number]) * 512, 200) for number in range(4)
    ]
    data = exactly(receiver, 4 * 200 * 512)
    for writer in writers:
        writer.result()
    messages = [data[start : start + 512] for start in range(0, len(data), 512)]
    io.log("messages", len(messages))
    io.log("torn", sum(len(set(message)) != 1 for message in messages))


def write_messages(sock: socket.socket, message: bytes, count: int) -> None:
    for _ in range(count):
        sock.send(message)


@scenario()
def processes_at_both_ends(io: Io) -> None:
    """A process at each end, 1 MB there and back"""
    sender, receiver = io.pair()
    child = os.fork()
    if not child:
        sender.close()
        receiver.sendall(exactly(receiver, 1 << 20))
        os._exit(0)
    receiver.close()
    data = pattern(1 << 20)
    writer = Background(sender.sendall, data)
    io.log("echo intact", exactly(sender, len(data)) == data)
    writer.result()
    io.log("then", to_end(sender))
    os.waitpid(child, 0)
