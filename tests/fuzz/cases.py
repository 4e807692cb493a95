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

from bpf import abi
from cni_plugin import names
from install.program.probes import heard_by_edges
from tests.light import CLIENT_IP, SERVER_IP, LightPod, set_nodelay
from tests.semantics.scenario import message_headers

TIMEOUT_S = 30
PATIENCE_S = 10
MOST = 64 << 20  # bytes: nothing stops a sender that gets rid of so many
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


class Ends:
    """Both ends of a connection, non-blocking; and bypassing, unless `joins` is false."""

    def __init__(
        self,
        pod: LightPod,
        target: tuple[str, int] | None = None,
        port: int = 0,
        *,
        joins: bool = True,
    ) -> None:
        with socket.create_server((SERVER_IP, port)) as listener:
            self.client = socket.socket()
            self.client.bind((CLIENT_IP, 0))
            self.client.connect(target or listener.getsockname())
            self.server, _ = listener.accept()
        set_nodelay(self.client, self.server)
        for each in (self.client, self.server):
            each.setblocking(False)
        if joins:
            self.join(pod)

    def join(self, pod: LightPod) -> None:
        """Exchanges until both have, and both directions bypass. Raises TimeoutError."""
        joined, ends = pod.total().joined, time.monotonic() + PATIENCE_S
        while pod.total().joined < joined + 2:
            if time.monotonic() > ends:
                raise TimeoutError("the sockets do not join")
            self.exchange()
        for _ in range(2):  # the first message after the peer has joined goes by TCP
            self.exchange()

    def exchange(self) -> None:
        for sender, reader in ((self.client, self.server), (self.server, self.client)):
            sender.send(b"ping")
            if heard(reader, 4) != b"ping":
                raise ValueError("the ends are not of one connection")


def heard(reader: socket.socket, size: int, timeout_s: float = 5) -> bytes:
    """Reads so many bytes of a non-blocking socket; fewer when they do not come, or at the end."""
    data = b""
    while len(data) < size and select.select([reader], [], [], timeout_s)[0]:
        part = reader.recv(size - len(data))
        if not part:
            break
        data += part
    return data


def edges_of(reader: socket.socket) -> select.epoll:
    edges = select.epoll()
    edges.register(reader, select.EPOLLIN | select.EPOLLET)
    return edges


def sent_until_full(sender: socket.socket) -> int:
    """How many bytes a sender gets rid of; MOST if nothing stops it."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while count < MOST:
            count += sender.send(bytes(100_000))
    return count


def paused_with_bytes_unread(pod: LightPod) -> bool:
    """What is sent while the bypass is paused comes before what is sent afterwards."""
    ends = Ends(pod)
    pod.pause()
    ends.client.send(b"first")
    pod.pause(False)
    ends.client.send(b"second")
    time.sleep(0.1)
    return heard(ends.server, 11) == b"firstsecond"


def paused_before_a_short_read(pod: LightPod) -> bool:
    ends = Ends(pod)
    edges = edges_of(ends.server)
    ends.client.send(b"first")
    pod.pause()
    ends.client.send(b"second")
    return heard_by_edges(edges, ends.server, 11) == 11


def member_that_sends_several(pod: LightPod) -> bool:
    """Both ends leave: after a message that TCP takes in part, sendmmsg would send the next."""
    ends = Ends(pod)
    texts = [ctypes.create_string_buffer(text, len(text)) for text in (b"first", b"second")]
    pod.pause()
    libc.sendmmsg(ends.client.fileno(), message_headers(texts), 2, 0)
    pod.pause(False)
    deadline = time.monotonic() + PATIENCE_S
    while pod.total().left < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return pod.total().left == 2 and heard(ends.server, 11) == b"firstsecond"


def urgent_byte(pod: LightPod) -> bool:
    """It is not in the stream, and both ends leave. Bytes lie unread when it comes."""
    text = ctypes.create_string_buffer(b"!", 1)
    headers = message_headers([text])
    calls: list[Callable[[socket.socket], int]] = [
        lambda sender: sender.send(b"!", socket.MSG_OOB),
        lambda sender: sender.sendmsg([b"!"], [], socket.MSG_OOB),
        lambda sender: int(libc.sendmmsg(sender.fileno(), headers, 1, socket.MSG_OOB)),
    ]
    for call in calls:
        ends, left = Ends(pod), pod.total().left
        ends.client.send(b"before")
        if call(ends.client) != 1:
            return False
        ends.client.send(b"after")
        first, urgent = heard(ends.server, 6), ends.server.recv(1, socket.MSG_OOB)
        if (first, urgent, heard(ends.server, 5)) != (b"before", b"!", b"after"):
            return False
        ends.client.send(b"more")
        with contextlib.suppress(OSError):  # EINVAL, as there is no urgent byte any more
            ends.server.recv(1, socket.MSG_OOB)
            return False
        if heard(ends.server, 4) != b"more":
            return False
        deadline = time.monotonic() + PATIENCE_S
        while pod.total().left < left + 2 and time.monotonic() < deadline:
            ends.exchange()
        if pod.total().left < left + 2:
            return False
    return True


def member_without_nodelay(pod: LightPod) -> bool:
    """It bypasses as long as it waits for answers. Both ends leave when it does not."""
    ends, before = Ends(pod), pod.total().bypassed_messages
    ends.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    for _ in range(100):
        ends.exchange()
    deadline = time.monotonic() + PATIENCE_S
    while pod.total().left < 2 and time.monotonic() < deadline:
        ends.client.send(b"pi")
        ends.client.send(b"ng")
        if heard(ends.server, 4) != b"ping":
            return False
        ends.server.send(b"ping")
        heard(ends.client, 4)
    total = pod.total()
    return total.left == 2 and total.bypassed_messages >= before + 200


def data_segments(reader: socket.socket) -> int:
    """tcpi_data_segs_in of struct tcp_info."""
    return int.from_bytes(
        reader.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 156)[152:], "little"
    )


def messages_without_nodelay(pod: LightPod) -> bool:
    """Each is one segment, though the kernel allocates some of them in two pieces: at the end of a
    page on which other bytes lie unread."""
    ends, others, message = Ends(pod), Ends(pod), bytes(3000)
    ends.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    pod.pause()
    before = data_segments(ends.server)
    for _ in range(100):
        ends.client.send(message)
        others.client.send(b"unread")
        if len(heard(ends.server, len(message))) < len(message):
            return False
        ends.server.send(b"!")
        heard(ends.client, 1)
    return data_segments(ends.server) == before + 100


def two_without_nodelay(pod: LightPod) -> bool:
    """Neither end joins."""
    ends = Ends(pod, joins=False)
    for end in (ends.client, ends.server):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    for _ in range(100):
        ends.exchange()
        time.sleep(0.001)
    total = pod.total()
    return (total.joined, total.connections.get("nagle")) == (0, 2)


def reader_that_rests(pod: LightPod) -> bool:
    """A sender is stopped."""
    ends = Ends(pod)
    return sent_until_full(ends.client) < MOST


def reader_that_wakes_late(pod: LightPod) -> bool:
    """It hears of the bytes behind the bound, though nothing more is sent."""
    ends = Ends(pod)
    edges = edges_of(ends.server)
    sent = 0
    while "backlog" not in pod.total().tcp_messages and sent < MOST:
        sent += ends.client.send(bytes(8_000))
    time.sleep(0.3)
    return heard_by_edges(edges, ends.server, sent) == sent


def leaves_unread(pod: LightPod) -> bool:
    """All sockets are to leave, with bytes unread."""
    ends = Ends(pod)
    ends.client.send(b"first")
    pod.control(abi.CONTROL_LEAVE)
    time.sleep(0.3)
    ends.client.send(b"second")
    return heard(ends.server, 11) == b"firstsecond"


def leaves_before_a_short_read(pod: LightPod) -> bool:
    ends = Ends(pod)
    edges = edges_of(ends.server)
    ends.client.send(b"first")
    pod.control(abi.CONTROL_LEAVE)
    time.sleep(0.3)
    ends.client.send(b"second")
    return heard_by_edges(edges, ends.server, 11) == 11


def connections_set_up_together(pod: LightPod) -> bool:
    with socket.create_server((SERVER_IP, 0), backlog=64) as listener:
        clients = [socket.socket() for _ in range(24)]
        set_nodelay(listener, *clients)
        for client in clients:
            client.setblocking(False)
            client.bind((CLIENT_IP, 0))
            client.connect_ex(listener.getsockname())
        servers = {}
        for _ in clients:
            server, peer = listener.accept()
            server.setblocking(False)
            servers[peer] = server
    ends = time.monotonic() + 1
    while time.monotonic() < ends:
        for number, client in enumerate(clients):
            server, said = servers[client.getsockname()], f"{number:04d}".encode()
            client.send(said)
            if heard(server, 4, 1) != said:
                return False
            server.send(said)
            if heard(client, 4, 1) != said:
                return False
    return pod.total().joined > 0


def blocking_duplex(_: LightPod) -> bool:
    """Each end of a connection sends in one thread and receives in another, both blocking."""
    with socket.create_server((SERVER_IP, 0)) as listener:
        client = socket.create_connection(listener.getsockname(), source_address=(CLIENT_IP, 0))
        server, _peer = listener.accept()
    set_nodelay(client, server)
    wrong: list[Exception] = []

    def say(end: socket.socket) -> None:
        try:
            for _message in range(100):
                end.sendall(b"small")
            for _message in range(200):
                end.sendall(bytes(100_000))
            end.shutdown(socket.SHUT_WR)
        except OSError as error:
            wrong.append(error)

    def hear(end: socket.socket) -> None:
        try:
            while end.recv(65_536):
                pass
        except OSError as error:
            wrong.append(error)

    threads = [
        threading.Thread(target=job, args=(end,), daemon=True)
        for end in (client, server)
        for job in (say, hear)
    ]
    for _exchange in range(100):  # it has time to join
        for sender, reader in ((client, server), (server, client)):
            sender.sendall(b"ping")
            reader.recv(4)
        time.sleep(0.001)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    return not wrong


def reused_socket(pod: LightPod) -> bool:
    """Unread bytes of the old connection are not read on the new one."""
    ends = Ends(pod)
    client, server = ends.client, ends.server
    server.send(b"of the old connection")
    time.sleep(0.1)
    libc.connect(client.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16)
    with socket.create_server((SERVER_IP, 0)) as other:
        client.connect_ex(other.getsockname())
        successor, _peer = other.accept()
    successor.send(b"of the new connection")
    return heard(client, 21) == b"of the new connection"


def idle_connection_tracking(pod: LightPod) -> bool:
    """The close arrives although connection tracking forgets within 4 s, after 9 s of bypass."""
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    nat = ["iptables", "-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "--dport", "80"]
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run([*nat, "-j", "REDIRECT", "--to-ports", "15001"], check=True)
    timeout = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established")
    timeout.write_text("4")
    ends = Ends(pod, (SERVER_IP, 80), 15001)
    over = time.monotonic() + 9
    while time.monotonic() < over:
        ends.exchange()
        time.sleep(0.25)
    ends.client.close()
    return bool(select.select([ends.server], [], [], 3)[0]) and ends.server.recv(1) == b""


class FaultingPage:
    """A page whose first touch blocks until `resolve` (userfaultfd): a send from it keeps its
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
    ends = Ends(pod)
    client, server = ends.client, ends.server
    os.seteuid(0)
    parts: list[bytes] = []

    def write(letter: bytes) -> None:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        client.sendall(letter * 100)

    def read() -> None:
        buffers = [ctypes.create_string_buffer(30) for _ in range(2)]
        libc.send(server.fileno(), ctypes.c_void_p(page.address), 10, 0)
        sizes = []
        for buffer in buffers:
            select.select([server], [], [], 5)
            sizes.append(libc.recv(server.fileno(), buffer, 30, 0))
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
        thread.join(20)
    data = b"".join(parts)
    data += heard(server, 200 - len(data))
    return data in {b"A" * 100 + b"B" * 100, b"B" * 100 + b"A" * 100}
