# SPDX-License-Identifier: Apache-2.0
"""What the rules are for, one case each, that a scenario of tests/semantics does not cover.

Each runs in a child process inside an accelerated cgroup and returns whether all went well.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cni_plugin import names
from tests.light import CLIENT_IP, SERVER_IP, LightPod

TIMEOUT_S = 20
CLONE_NEWNET = 0x40000000
libc = ctypes.CDLL(None, use_errno=True)

Case = Callable[[LightPod], bool]


def holds(case: Case, pod: LightPod) -> bool:
    """Runs a case in a child; a child that hangs or dies counts as a failure."""
    child = os.fork()
    if not child:
        try:
            signal.alarm(TIMEOUT_S)
            pod.enter()
            os._exit(0 if case(pod) else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


def connected(target: tuple[str, int] | None = None, port: int = 0) -> tuple[socket.socket, ...]:
    """(client, server), after one byte each way."""
    listener = socket.create_server((SERVER_IP, port))
    client = socket.socket()
    client.bind((CLIENT_IP, 0))
    client.connect(target or listener.getsockname())
    server, _ = listener.accept()
    client.sendall(b"c")
    server.recv(1)
    server.sendall(b"s")
    client.recv(1)
    return client, server


def sleeping_reader(pod: LightPod) -> bool:
    """A reader inside recv(MSG_WAITALL) that has part of its bytes by TCP gets the rest."""
    client, server = connected()
    received: list[bytes] = []

    def read() -> None:
        data = b""
        while len(data) < 30:
            data += server.recv(30 - len(data), socket.MSG_WAITALL)
        received.append(data)

    pod.pause()
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    time.sleep(0.1)
    client.sendall(b"0123456789")  # by TCP
    time.sleep(0.1)
    pod.pause(False)
    server.sendall(b"ok")  # from here on the client could bypass, were nobody asleep
    client.recv(2)
    client.sendall(b"abcdefghij")
    client.sendall(b"ABCDEFGHIJ")
    reader.join(5)
    return received == [b"0123456789abcdefghijABCDEFGHIJ"]


def reused_socket(_: LightPod) -> bool:
    """Unread bytes of the old connection are not read on the new one."""
    client, server = connected()
    server.sendall(b"of the old connection")
    time.sleep(0.1)
    libc.connect(client.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16)
    with socket.create_server((SERVER_IP, 0)) as other:
        client.connect(other.getsockname())
        successor, _peer = other.accept()
    successor.sendall(b"of the new connection")
    return client.recv(100) == b"of the new connection"


def idle_connection_tracking(_: LightPod) -> bool:
    """The close arrives although connection tracking forgets within 4 s, after 9 s of bypass."""
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    nat = ["iptables", "-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "80"]
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run([*nat, "-j", "REDIRECT", "--to-ports", "15001"], check=True)
    timeout = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established")
    timeout.write_text("4")
    client, server = connected((SERVER_IP, 80), 15001)
    ends = time.monotonic() + 9
    while time.monotonic() < ends:
        client.sendall(b"ping")
        server.recv(100)
        server.sendall(b"pong")
        client.recv(100)
        time.sleep(0.25)
    client.close()
    server.settimeout(3)
    try:
        return server.recv(1) == b""
    except TimeoutError:
        return False


class FaultingPage:
    """A page whose first touch blocks until `resolve` (userfaultfd): a recv into it keeps its
    socket locked for as long."""

    def __init__(self) -> None:
        uffdio_api, uffdio_register, user_mode_only = 0xC018AA3F, 0xC020AA00, 0
        self._fd = libc.syscall(323, os.O_CLOEXEC | user_mode_only)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "userfaultfd")
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        fcntl.ioctl(self._fd, uffdio_api, bytearray(struct.pack("QQQ", 0xAA, 0, 0)))
        missing = struct.pack("QQQQ", self.address, mmap.PAGESIZE, 1, 0)
        fcntl.ioctl(self._fd, uffdio_register, bytearray(missing))

    def resolve(self) -> None:
        uffdio_zeropage = 0xC020AA04
        zero = struct.pack("QQQQ", self.address, mmap.PAGESIZE, 0, 0)
        fcntl.ioctl(self._fd, uffdio_zeropage, bytearray(zero))


def two_writers(pod: LightPod) -> bool:
    """Two threads' messages stay whole when the bypass is left between them.

    The receiver's lock is held while one thread's redirect waits for it; the other thread sends
    after the bypass was paused. The writers have idle priority, so that the receiver is at its
    next two reads before the redirect that it woke has the lock.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    page = FaultingPage()
    os.seteuid(names.PROXY_UID)  # towards an application nobody would wait for a held lock
    client, server = connected()
    os.seteuid(0)
    client.sendall(b"f" * 10)
    parts: list[bytes] = []

    def write(letter: bytes) -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        client.sendall(letter * 100)

    def read() -> None:
        buffers = [ctypes.create_string_buffer(30) for _ in range(2)]
        libc.recv(server.fileno(), ctypes.c_void_p(page.address), 10, 0)
        sizes = [libc.recv(server.fileno(), buffer, 30, 0) for buffer in buffers]
        parts.extend(buffer.raw[:size] for buffer, size in zip(buffers, sizes))

    threads = [threading.Thread(target=read)]
    threads[0].start()
    time.sleep(0.2)
    for letter in (b"A", b"B"):
        threads.append(threading.Thread(target=write, args=(letter,)))
        threads[-1].start()
        time.sleep(0.2)
        pod.pause()
    page.resolve()
    for thread in threads:
        thread.join(5)
    data = b"".join(parts)
    while len(data) < 200:
        data += server.recv(200)
    return data in {b"A" * 100 + b"B" * 100, b"B" * 100 + b"A" * 100}


def edge_triggered_reader_that_parts(_: LightPod) -> bool:
    """An application streams until it leaves the sockhash, with bytes unread that came by bypass.

    It has no TCP_NODELAY; otherwise it might stay.

    It is edge-triggered and takes a short read for the end of what is there, as epoll(7) allows;
    the second piece that its sidecar says must not come by TCP behind the first.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.seteuid(names.PROXY_UID)
    sidecar = socket.socket()
    os.seteuid(0)
    with socket.create_server((SERVER_IP, 0)) as listener, sidecar:
        sidecar.bind((CLIENT_IP, 0))
        sidecar.connect(listener.getsockname())
        app, _ = listener.accept()
        app.setblocking(False)
        edges = select.epoll()
        edges.register(app, select.EPOLLIN | select.EPOLLET)
        sidecar.sendall(b"first")
        for _number in range(3000):
            app.send(b"x" * 100)
        sidecar.settimeout(0.02)
        for _number in range(6):
            with contextlib.suppress(TimeoutError):
                while sidecar.recv(1 << 20):
                    pass
            app.send(b"y" * 100)
        sidecar.sendall(b"second")
        heard = b""
        while heard != b"firstsecond" and edges.poll(2):
            part = b"?" * 4096
            while len(part) == 4096:
                part = app.recv(4096)
                heard += part
        return heard == b"firstsecond"
