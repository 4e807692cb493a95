# SPDX-License-Identifier: Apache-2.0
"""However a connection, a process, a pod or a generation ends: as over TCP, or on over TCP."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import multiprocessing
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from bpf import abi, bpfsys, pins
from bpf.stats import HopCounters
from install.program.generations import Generation
from install.program.passes import repeated
from install.program.served import Bell
from tests.bed import APP_UID, PROXY_UID, bpf_objects, cgroups, netns, open_bed
from tests.bed.pod import within
from tests.integration import reach, traffic_pods
from tests.integration.traffic_pods import (
    FIRST_BYTES,
    LightNode,
    LightPod,
    accepted,
    bypassed,
    connected,
    eventually,
    exchange,
    outcomes,
    read_to_end,
    receive,
    reset,
)
from tests.integration.traffic_stream import Streams
from tests.light import ACQUAINTANCE, LIMITS

A, B, C = "10.9.0.1", "10.9.0.2", "10.9.0.3"
MB = 1 << 20
STREAM = 256 * 1024  # TB_STREAM
JOINER_S = 20.0  # until the joiner has let go of a generation that is gone
BUFFERS = (socket.SO_RCVBUF, socket.SO_SNDBUF)
# Not TCPTimeouts: on a machine without a CPU to spare a timer ends though nothing was dropped.
LOST = ("TCPBacklogDrop", "TCPRcvQDrop")

# linux/userfaultfd.h; x86-64
SYS_USERFAULTFD = 323
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_ZEROPAGE = 0xC018AA3F, 0xC020AA00, 0xC020AA04

libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def node() -> Iterator[LightNode]:
    with traffic_pods.node() as made:
        yield made


@pytest.fixture
def pods(node: LightNode) -> Iterator[tuple[LightPod, LightPod]]:
    earlier = node.pending()
    with node.pod(A) as client, node.pod(B) as server:
        yield client, server
        assert eventually(lambda: node.sockets() == 0)
        assert node.pending(but=earlier) == []


# ---- Conntrack -----------------------------------------------------------------------------------


def test_conntrack_entries_outlive_bypassed_traffic(node: LightNode) -> None:
    """A 4 s timeout, 13 s of bypassed traffic: then the close must get through the NAT. Without
    the rule it would not (tests/fuzz/test_mutants.py)."""
    with node.pod(A) as pod, ExitStack() as stack:
        pod.command("iptables -t nat -A OUTPUT -p tcp -d 10.96.0.1 -j REDIRECT --to-ports 15001")
        pod.sysctl("net.netfilter.nf_conntrack_tcp_timeout_established", 4)
        envoy = stack.enter_context(pod.listen(15001, uid=PROXY_UID))
        app = stack.enter_context(pod.connect(("10.96.0.1", 80), uid=APP_UID))
        taken = stack.enter_context(accepted(envoy))
        exchange(app, taken)
        deadline = time.monotonic() + 13
        while time.monotonic() < deadline:
            exchange(app, taken, rounds=2)
            time.sleep(0.25)
        counted = pod.total()
        assert set(counted.tcp_messages) == {"waiting", "order", "refresh"}
        assert counted.bypassed_messages > counted.tcp_messages["refresh"]
        app.shutdown(socket.SHUT_WR)
        assert taken.recv(1) == b""


@pytest.mark.parametrize("first", ["client", "server"])
def test_conntrack_entries_outlive_a_half_closed_connection(node: LightNode, first: str) -> None:
    """Conntrack keeps a half-closed entry for 3 s: 6 s of answers get through, and their end."""
    with node.pod(A) as pod, ExitStack() as stack:
        pod.command("iptables -t nat -A OUTPUT -p tcp -d 10.96.0.1 -j REDIRECT --to-ports 15001")
        for state in ("close_wait", "fin_wait"):
            pod.sysctl(f"net.netfilter.nf_conntrack_tcp_timeout_{state}", 3)
        envoy = stack.enter_context(pod.listen(15001, uid=PROXY_UID))
        app = stack.enter_context(pod.connect(("10.96.0.1", 80), uid=APP_UID))
        ends = app, stack.enter_context(accepted(envoy))
        exchange(*ends)
        ours, theirs = ends if first == "client" else ends[::-1]
        ours.sendall(b"last words")
        ours.shutdown(socket.SHUT_WR)
        assert read_to_end(theirs) == b"last words"
        for _ in range(12):
            theirs.sendall(bytes(100))
            assert receive(ours, 100) == bytes(100)
            time.sleep(0.5)
        theirs.close()
        assert read_to_end(ours) == b""
        assert bypassed(pod) > 0
        assert pod.total().tcp_messages["half_closed"] == 12


@pytest.mark.parametrize("reader_uid", [APP_UID, PROXY_UID])
def test_what_lies_unread_at_a_half_close_comes_first(
    pods: tuple[LightPod, LightPod], reader_uid: int
) -> None:
    """And so does what is sent until it is read; a peeker sees all of it."""
    with connected(*pods, client_uid=reader_uid) as (ours, theirs):
        exchange(ours, theirs)
        theirs.sendall(b"before ")
        ours.shutdown(socket.SHUT_WR)
        assert theirs.recv(1) == b""
        theirs.sendall(b"behind ")
        assert eventually(lambda: ours.recv(100, socket.MSG_PEEK) == b"before behind ")
        assert receive(ours, 14) == b"before behind "
        theirs.sendall(b"later")
        theirs.close()
        assert read_to_end(ours) == b"later"


# ---- Ends of connections -------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["client", "server"])
def test_half_close(pods: tuple[LightPod, LightPod], first: str) -> None:
    for _ in range(20):
        with connected(*pods) as ends:
            exchange(*ends)
            ours, theirs = ends if first == "client" else ends[::-1]
            ours.sendall(b"last words")
            ours.shutdown(socket.SHUT_WR)
            assert read_to_end(theirs) == b"last words"
            for number in range(5):
                theirs.sendall(b"answer %d" % number)
            theirs.close()
            assert read_to_end(ours) == b"".join(b"answer %d" % number for number in range(5))
    assert eventually(lambda: bypassed(*pods) > 20 * 50)


@pytest.mark.parametrize("closer", ["client", "server"])
def test_close_right_behind_the_data(pods: tuple[LightPod, LightPod], closer: str) -> None:
    data = os.urandom(60_000)
    for _ in range(20):
        with connected(*pods) as ends:
            exchange(*ends)
            ours, theirs = ends if closer == "client" else ends[::-1]
            ours.sendall(data)
            ours.close()
            assert read_to_end(theirs) == data
    assert eventually(lambda: bypassed(*pods) > 20 * 1_000)


def test_reset(pods: tuple[LightPod, LightPod]) -> None:
    with connected(*pods) as (ours, theirs):
        exchange(ours, theirs)
        reset(ours)
        with pytest.raises(ConnectionResetError):
            theirs.recv(1)
        with pytest.raises(BrokenPipeError):
            theirs.sendall(b"too late")


def test_close_lingers_until_the_data_is_out(pods: tuple[LightPod, LightPod]) -> None:
    data = os.urandom(MB)
    with connected(*pods) as (ours, theirs):
        exchange(ours, theirs)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
        pid = os.fork()
        if pid == 0:
            ours.setblocking(True)
            ours.sendall(data)
            ours.close()
            os._exit(0)
        ours.close()
        time.sleep(0.2)
        assert read_to_end(theirs) == data
        assert os.waitpid(pid, 0)[1] == 0


def test_close_with_unread_bytes_ends_the_connection(pods: tuple[LightPod, LightPod]) -> None:
    with connected(*pods) as (ours, theirs):
        exchange(ours, theirs)
        theirs.sendall(b"never read")
        ours.close()
        try:
            assert theirs.recv(1) == b""  # by TCP it would be an RST: docs/limits.md
        except ConnectionResetError:
            return
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_until_refused(theirs)


def send_until_refused(sock: socket.socket) -> None:
    """Nobody reads any more: the kernel says so soon."""
    for _ in range(200):
        sock.sendall(bytes(1_000))
        time.sleep(0.01)


# ---- Processes -----------------------------------------------------------------------------------

COUNTER = """
import socket, struct, sys
client = socket.create_connection((sys.argv[1], 8080), timeout=20)
client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
client.sendall(b"hello"); client.recv(5)
while client.recv(2) == b"go": client.sendall(b"ready")
number = 0
while True:
    client.sendall(struct.pack("!1000I", *range(number, number + 1000)))
    number += 1000
"""

SINK = """
import socket, sys
client = socket.create_connection((sys.argv[1], 8080), timeout=20)
client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
client.sendall(b"hello")
while client.recv(1 << 16): client.sendall(b"k")
"""


def until_joined(pod: LightPod) -> None:
    """Passes, until both ends of the one connection of a process of this pod have joined."""

    def has_joined() -> bool:
        pod.node.visit(pod)
        return pod.node.sockets() == 2

    assert eventually(has_joined)


def test_the_sender_is_killed(pods: tuple[LightPod, LightPod]) -> None:
    client, server = pods
    with server.listen() as listener:
        child = client.popen([sys.executable, "-c", COUNTER, B], uid=PROXY_UID)
        with accepted(listener) as theirs:
            assert receive(theirs, 5) == b"hello"
            theirs.sendall(b"start")
            for number in range(ACQUAINTANCE + 2):  # the first one after joining goes by TCP
                if number == ACQUAINTANCE:
                    until_joined(client)
                theirs.sendall(b"go")
                assert receive(theirs, 5) == b"ready"
            theirs.sendall(b"!!")
            head = receive(theirs, MB)
            child.kill()
            child.wait()
            try:
                rest = read_to_end(theirs)
            except ConnectionResetError:
                rest = b""
    data = head + rest
    numbers = struct.unpack(f"!{len(data) // 4}I", data[: len(data) // 4 * 4])
    assert numbers == tuple(range(len(numbers)))
    assert bypassed(client) > 0


def test_the_receiver_is_killed(pods: tuple[LightPod, LightPod]) -> None:
    client, server = pods
    with server.listen() as listener:
        child = client.popen([sys.executable, "-c", SINK, B], uid=PROXY_UID)
        with accepted(listener) as theirs:
            assert receive(theirs, 5) == b"hello"
            for number in range(50):
                theirs.sendall(bytes(1_000))
                assert theirs.recv(1) == b"k"
                if number == ACQUAINTANCE:
                    until_joined(client)
            child.kill()
            child.wait()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                send_until_refused(theirs)
    assert bypassed(server) > 0


def test_a_forked_process_goes_on_with_the_connection(pods: tuple[LightPod, LightPod]) -> None:
    with connected(*pods) as (ours, theirs):
        exchange(ours, theirs)
        pid = os.fork()
        if pid == 0:
            theirs.close()
            ours.sendall(b"from the child")
            if receive(ours, 12) != b"to the child":
                os._exit(1)
            ours.sendall(b"goodbye")
            os._exit(0)
        ours.close()  # the connection lives on in the child
        assert receive(theirs, 14) == b"from the child"
        theirs.sendall(b"to the child")
        assert os.waitpid(pid, 0)[1] == 0
        assert read_to_end(theirs) == b"goodbye"
    assert eventually(lambda: bypassed(*pods) > 0)


GUEST = """
import socket
channel = socket.socket(fileno=0)
_, (fd,), _, _ = socket.recv_fds(channel, 1, 1)
passed = socket.socket(fileno=fd)
passed.settimeout(20)
while data := passed.recv(1000): passed.sendall(data[::-1])
"""


def test_a_socket_passed_to_a_process_of_another_pod(
    node: LightNode, pods: tuple[LightPod, LightPod]
) -> None:
    client, server = pods
    with node.pod(C) as elsewhere, connected(client, server) as (ours, theirs):
        exchange(ours, theirs)
        before = bypassed(server)
        here, there = socket.socketpair()
        guest = [sys.executable, "-c", GUEST]
        space, cgroup = elsewhere.netns.path, elsewhere.cgroup
        with here, there:
            command = within(guest, netns=space, cgroup=cgroup, user=str(APP_UID))
            child = subprocess.Popen(command, stdin=there.fileno())
            socket.send_fds(here, [b"x"], [theirs.fileno()])
            theirs.close()
            for number in range(50):
                text = b"message %d" % number
                ours.sendall(text)
                assert receive(ours, len(text)) == text[::-1]
            ours.shutdown(socket.SHUT_WR)
            assert read_to_end(ours) == b""
            assert child.wait() == 0
        assert eventually(lambda: bypassed(server) > before)  # it is the server's socket still
        assert elsewhere.counters() == {}


# ---- The node ------------------------------------------------------------------------------------


def test_pause_and_resume_during_transfers(pods: tuple[LightPod, LightPod]) -> None:
    client, server = pods
    with connected(client, server) as ends:
        exchange(*ends)
        streams = Streams(*ends, seed=1)
        for _ in range(8):
            streams.flow()
            client.node.pause(True)
            streams.flow()
            before = bypassed(client, server)
            streams.flow()
            assert bypassed(client, server) == before
            client.node.pause(False)
        streams.flow()
        total = streams.finish()
    assert bypassed(client, server) > 0
    assert total > 3 * MB
    assert client.total().tcp_messages["paused"] > 0


def test_bypass_does_not_overtake_what_was_sent_during_a_pause(
    pods: tuple[LightPod, LightPod],
) -> None:
    node = pods[0].node
    with connected(*pods) as (ours, theirs):
        exchange(ours, theirs)
        for read_between in (False, True):
            node.pause(True)
            ours.sendall(b"first by TCP, ")
            time.sleep(0.05)
            if read_between:
                assert receive(theirs, 6) == b"first "
            theirs.sendall(b"go")  # says how far it has read
            node.pause(False)
            assert receive(ours, 2) == b"go"
            ours.sendall(b"then the rest")
            assert receive(theirs, 27 - 6 * read_between).endswith(b"by TCP, then the rest")
            exchange(ours, theirs)


def test_a_pod_is_deleted_during_a_transfer(pods: tuple[LightPod, LightPod]) -> None:
    """Its processes may live on for a while; their connections go on, new ones are left alone."""
    client, server = pods
    with connected(client, server) as ends:
        exchange(*ends)
        streams = Streams(*ends, seed=2)
        streams.flow()
        record = server.record
        server.record = abi.Pod()
        server.write_record()
        server.detach()
        counters = server.node.programs.fds[pins.COUNTERS]
        for hop in range(len(abi.HOPS)):
            with suppress(FileNotFoundError):
                bpfsys.map_delete(counters, bytes(abi.CounterKey(record.id, hop, 0)))
        server.record = record
        streams.flow()
        before = bypassed(client)
        with (
            server.listen(8081) as listener,
            client.connect((B, 8081)) as ours,
            accepted(listener) as theirs,
        ):
            exchange(ours, theirs, rounds=traffic_pods.SEEKING)
        assert outcomes(client).get("no_peer") == 1
        streams.flow()
        assert eventually(lambda: bypassed(client) > before)
        streams.finish()
        assert server.counters() == {}  # DEL has removed them, and nobody brings them back
    server.attach()


def test_full_maps() -> None:
    """What finds no room stays on TCP and works; room that is free again is used again."""
    with (
        traffic_pods.node(replace(LIMITS, sockets=4)) as node,
        node.pod(A) as client,
        node.pod(B) as server,
    ):
        for _ in range(2):
            before = bypassed(client, server)
            with server.listen() as listener, ExitStack() as stack:
                pairs = []
                for _ in range(6):
                    ours = stack.enter_context(client.connect((B, 8080)))
                    pairs.append((ours, stack.enter_context(accepted(listener))))
                traffic_pods.talk_all(pairs, rounds=10)
                assert node.sockets() == 4
            assert eventually(lambda: node.sockets() == 0)
            assert bypassed(client, server) > before
        assert outcomes(client, server)["full"] >= 8


# ---- Peers that do not behave --------------------------------------------------------------------


def slab_kib() -> int:
    """The kernel's own memory that cannot be taken back, all of the machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("SUnreclaim:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no SUnreclaim")


def test_small_messages_to_a_stalled_reader_take_no_memory(
    pods: tuple[LightPod, LightPod],
) -> None:
    """A redirect of one byte takes a kilobyte; uncounted, a stalled reader took 130 MB."""
    with connected(*pods) as (ours, theirs):
        exchange(ours, theirs)
        ours.setblocking(False)
        before, sent = slab_kib(), 0
        with suppress(BlockingIOError):
            while sent < MB:
                sent += ours.send(b"x")
        taken = slab_kib() - before
        assert sent < MB
        assert taken < 32 * 1024, f"{taken} KiB for {sent} messages"
        ours.close()
        assert read_to_end(theirs) == b"x" * sent
    assert eventually(lambda: bypassed(*pods) > 100)


def test_bytes_behind_others_ring_for_an_edge(
    node: LightNode, pods: tuple[LightPod, LightPod]
) -> None:
    """The joiner makes no pass in debt, but for those: tests/unit/test_joiner.py."""
    bell = Bell(node.programs.fds[pins.BELL])
    with closing(bell), connected(*pods) as (ours, theirs):
        bell.drain()
        bell.take_edge()  # of earlier tests
        exchange(ours, theirs)
        bell.drain()
        assert not bell.take_edge()
        ours.setblocking(False)
        with suppress(BlockingIOError):
            for _ in range(MB // 1000):
                ours.send(bytes(1000))
        bell.drain()
        assert bell.take_edge()


@pytest.mark.parametrize("size", [50_000, 150_000, 300_000])
def test_a_short_read_still_means_that_all_is_read(
    pods: tuple[LightPod, LightPod], size: int
) -> None:
    """epoll(7) says so of a stream, and nginx and tokio, edge-triggered, wait for more after one.
    The reader looks late, when everything has arrived, so there is no edge to come but a pass'."""
    with (
        connected(*pods) as (ours, theirs),
        select.epoll() as poller,
        repeated(pods[0].node.visit, 0.004, BlockingIOError),
    ):
        exchange(ours, theirs)
        for start in range(0, size, 10_000):
            ours.sendall(bytes(min(10_000, size - start)))
        poller.register(theirs, select.EPOLLIN | select.EPOLLET | select.EPOLLRDHUP)
        theirs.setblocking(False)
        received = 0
        while received < size:
            assert poller.poll(3), f"no edge after {received} of {size} bytes"
            while (read := len(theirs.recv(16_384))) == 16_384:
                received += read
            received += read
    assert bypassed(*pods) > 0


def page_that_never_comes() -> tuple[int, mmap.mmap, int]:
    """userfaultfd(2), its page and the page's address: whoever touches it waits for zero_page()."""
    fd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC)
    fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("=QQQ", 0xAA, 0, 0)))
    page = mmap.mmap(-1, mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(page))
    missing = struct.pack("=QQQQ", start, mmap.PAGESIZE, 1, 0)
    fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(missing))
    return fd, page, start


def zero_page(fd: int, start: int) -> None:
    """Let it come."""
    fcntl.ioctl(fd, UFFDIO_ZEROPAGE, bytearray(struct.pack("=QQQQ", start, mmap.PAGESIZE, 0, 0)))


def test_a_receiver_that_holds_its_socket_does_not_hold_its_sender(
    pods: tuple[LightPod, LightPod],
) -> None:
    """A redirect waits for the receiver's socket lock, which a fault in recv may hold for ever."""
    with connected(*pods) as (ours, theirs):
        exchange(ours, theirs)
        ours.sendall(b"first")
        fd, page, start = page_that_never_comes()
        reading = threading.Thread(
            target=libc.recv, args=(theirs.fileno(), ctypes.c_void_p(start), 100, 0)
        )
        reading.start()
        time.sleep(0.1)
        sending = threading.Thread(target=ours.sendall, args=(b"second",), daemon=True)
        sending.start()
        sending.join(timeout=20)
        held_up = sending.is_alive()
        zero_page(fd, start)
        reading.join()
        sending.join()
        assert page[:5] == b"first"
        os.close(fd)
        assert not held_up
        assert receive(theirs, 6) == b"second"
        assert pods[0].total().tcp_messages["busy"] == 1


def peek_and_answer(theirs: socket.socket, rounds: int) -> None:
    """Looks until eight bytes are there, without a pause, and only then reads them."""
    theirs.setblocking(False)
    for _ in range(rounds):
        found = b""
        while len(found) < 8:
            with contextlib.suppress(BlockingIOError):
                found = theirs.recv(8, socket.MSG_PEEK)
        assert theirs.recv(8) == found
        theirs.sendall(b"k")


def test_a_reader_that_looks_all_the_time_sees_all(pods: tuple[LightPod, LightPod]) -> None:
    """Bytes by TCP behind bypassed ones, which it leaves there, it would never see."""
    rounds = 5000
    with connected(*pods) as (ours, theirs):
        exchange(ours, theirs)
        peeker = multiprocessing.get_context("fork").Process(
            target=peek_and_answer, args=(theirs, rounds)
        )
        peeker.start()
        try:
            for _ in range(rounds):
                ours.sendall(b"head")
                ours.sendall(b"tail")
                assert ours.recv(1) == b"k"
            peeker.join(timeout=20)
            assert peeker.exitcode == 0
        finally:
            peeker.kill()
            peeker.join()


# ---- Generations, with the real loader and plugin ------------------------------------------------


def test_load_and_unload_during_transfers() -> None:
    with (
        open_bed() as bed,
        bed.pod("client") as client,
        bed.pod("server") as server,
        traffic_pods.socket_maker() as maker,
        reach.visiting(bed),
    ):
        old = bpf_objects.pinned(bed.node.bpffs)

        def connection(port: int) -> tuple[socket.socket, socket.socket]:
            with maker.make(server, PROXY_UID, socket.AF_INET) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("", 15006))  # where the pods' iptables send everything
                listener.listen()
                ours = maker.make(client, PROXY_UID, socket.AF_INET)
                ours.connect((server.ip, port))
                return ours, accepted(listener)

        def sidecars() -> int:
            found = [pod["hops"].get("sidecars") for pod in bed.node.status()["pods"]]
            return sum(hop["bypassed_bytes"] for hop in found if hop)

        def is_empty(number: int) -> bool:
            folder = bed.node.bpffs / f"gen-{number}"
            return not folder.exists() or not Generation(folder).has_sockets()

        silent, first = connection(8082), connection(8080)
        reach.join(bed, silent, first)
        exchange(*silent)
        streams = Streams(*first, seed=3)
        streams.flow()
        assert sidecars() > 0
        assert not is_empty(1)
        bed.node.load()
        assert eventually(lambda: is_empty(1))
        second = connection(8081)
        more = Streams(*second, seed=4)
        more.flow()
        streams.flow()
        status = bed.node.status()
        assert {pod["generation"] for pod in status["pods"]} == {"gen-2"}
        before = sidecars()
        reach.join(bed, silent)  # once more: the new programs have paired its sockets, too
        assert exchange(*silent) > 0
        assert eventually(lambda: sidecars() > before)
        new = bpf_objects.pinned(bed.node.bpffs) - old
        bed.node.load()  # removes what is idle
        assert eventually(lambda: bpf_objects.surviving(old) == [], JOINER_S)
        more.flow()
        bed.node.call("unload")
        more.flow()
        streams.flow()
        exchange(*silent)
        assert streams.finish() > 0
        assert more.finish() > 0
        # Though all three are open still.
        assert eventually(lambda: bpf_objects.surviving(new) == [], JOINER_S)
        for pair in (silent, first, second):
            close(pair)
        maker.leave()


def close(pair: tuple[socket.socket, socket.socket]) -> None:
    for sock in pair:
        sock.close()


def test_what_a_killed_test_left_is_removed() -> None:
    left = f"tl-{2**22 + 1}-0"  # no process has this id
    folder = cgroups.mount_point() / left
    with ExitStack() as stack:
        stack.enter_context(cgroups.made(folder))
        stack.enter_context(netns.created(f"{left}-switch"))
        with traffic_pods.node():
            assert not folder.exists()
            assert netns.names(left) == []


# ---- Large writes ----------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [APP_UID, PROXY_UID])
def test_not_more_unread_than_its_bound(node: LightNode, uid: int) -> None:
    """A reader that answers and does not read: no stream, see TB_STREAM."""
    with node.pod(A) as pod:
        with connected(pod, pod, server_uid=uid) as (sender, reader):
            rcvbuf, sndbuf = (reader.getsockopt(socket.SOL_SOCKET, name) for name in BUFFERS)
            bound = rcvbuf + sndbuf // (2 if uid == PROXY_UID else 4)  # tb_bound()
            before = exchange(sender, reader) - FIRST_BYTES
            sender.setblocking(False)
            sent = answers = 0
            with suppress(BlockingIOError):
                while sent < 64 << 20:
                    sent += sender.send(bytes(100_000))
                    answers += reader.send(b"!")
            sender.setblocking(True)
            assert receive(reader, sent) == bytes(sent)
        assert pod.total().tcp_messages["backlog"] > 0
        assert before + bound // 2 < bypassed(pod) <= before + bound + answers
        assert pod.tcp_ext("TCPRcvQDrop") == pod.tcp_ext("TCPBacklogDrop") == 0


@pytest.mark.parametrize("size", [16_384, 65_536, 1 << 20])
@pytest.mark.parametrize("to", [A, B])
def test_nothing_is_lost_behind_large_writes(node: LightNode, to: str, size: int) -> None:
    """Their reader's TCP would drop what comes while that is inside a read, for want of room: the
    rest, or the FIN, would come again after 200 ms."""
    data = bytes(1 << 20)
    with ExitStack() as stack:
        pods = {ip: stack.enter_context(node.pod(ip)) for ip in (A, B)}
        listener = stack.enter_context(pods[to].listen(uid=PROXY_UID))
        pool = stack.enter_context(ThreadPoolExecutor())
        exchanged = 0
        for _ in range(50):
            sender = pods[A].connect((to, 8080), uid=PROXY_UID)
            with accepted(listener) as reader:
                exchanged += exchange(sender, reader, rounds=2)
                everything = pool.submit(read_to_end, reader)
                with sender:
                    for start in range(0, len(data), size):
                        sender.sendall(data[start : start + size])
                assert everything.result() == data
        for pod in pods.values():
            assert [pod.tcp_ext(name) for name in LOST] == [0] * len(LOST)
        if size < len(data):  # one of 1 MB is a stream by itself: TCP
            assert bypassed(*pods.values()) > exchanged


SMALL_BUFFERS = {"tcp_rmem": "4096 87380 262143", "tcp_shrink_window": 1}


@pytest.mark.parametrize("uid", [APP_UID, PROXY_UID])
@pytest.mark.parametrize("why", ["SO_RCVBUF", *SMALL_BUFFERS])
def test_whose_receive_buffer_cannot_grow_is_left_alone(
    node: LightNode, why: str, uid: int
) -> None:
    """Behind redirected bytes its TCP would drop the sender's; they would come by a timer."""
    with node.pod(A) as pod:
        if why in SMALL_BUFFERS:
            pod.sysctl(f"net.ipv4.{why}", SMALL_BUFFERS[why])
        with connected(pod, pod, client_uid=PROXY_UID, server_uid=uid) as (sender, reader):
            if why == "SO_RCVBUF":
                reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
            for size in (10, 1000, 100_000):
                sender.sendall(bytes(size))
                assert receive(reader, size) == bytes(size)
            assert bypassed(pod) == 0
            # If it has joined at all, it leaves: so many messages went by TCP in vain.
            assert eventually(
                lambda: exchange(sender, reader, rounds=20) > 0 and node.sockets() == 0, 20
            )
            assert bypassed(pod) == 0


# ---- Streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize("speaks", ["client", "server"])
def test_a_stream_without_answers_leaves_at_both_ends(
    pods: tuple[LightPod, LightPod], speaks: str
) -> None:
    """The end that only reads as well; no byte is lost."""
    node = pods[0].node
    with connected(*pods) as ends:
        sender, reader = ends if speaks == "client" else reversed(ends)
        exchange(*ends)
        assert node.sockets() == 2
        before = bypassed(*pods)
        for _ in range(20):
            data = os.urandom(10_000)
            for start in range(0, len(data), 100):
                sender.sendall(data[start : start + 100])
            assert receive(reader, len(data)) == data

        def has_left() -> bool:
            node.visit()
            return node.sockets() == 0

        assert eventually(has_left)
        counted = sum((pod.total() for pod in pods), HopCounters())
        assert counted.tcp_messages["stream"] > 1024  # TB_FIRST_CREDIT
        assert 0 < counted.bypassed_bytes - before < STREAM
        assert exchange(*ends)
        assert outcomes(*pods) == {"paired": 2}
