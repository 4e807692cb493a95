# SPDX-License-Identifier: Apache-2.0
"""Accelerated pods without a CNI chain: a cgroup, a namespace and a record each, in milliseconds.

What ADD would write is under the test's control, so that what a pod is told, and what it is, can
be made to disagree. The pods hang on one bridge; a socket in a pod is one call (traffic.py).
"""

from __future__ import annotations

import ctypes
import functools
import ipaddress
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyroute2
from bcc import lib

from bpf import abi, bpfsys, pins, stats
from bpf.loader import VISIT, Limits, Programs
from install.program import passes
from tests.bed import APP_UID, PROXY_UID, cgroups, netns
from tests.bed.netns import NetNamespace
from tests.bed.pod import within
from tests.integration import traffic
from tests.light import ACQUAINTANCE, LIMITS

SEEKING = 20  # rounds, in which the ends of a connection give up to look for each other
FIRST_BYTES = 2 * ACQUAINTANCE + 2  # of exchange(): those, and the first after both have joined
TIMEOUT_S = 10.0
IPPROTO_MPTCP = 262
BRIDGE = "br0"
HALF_KEY = struct.Struct("=16x8xII")  # struct tb_half_key of bpf/tcpip_bypass.c

_numbers = itertools.count()
_nodes: list[LightNode] = []


class Place(Protocol):
    """A pod, of this module or of the testbed."""

    @property
    def netns(self) -> NetNamespace: ...
    @property
    def cgroup(self) -> Path: ...


@dataclass
class Maker:
    """The process that makes sockets in pods."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    place: Place | None = None

    def leave(self) -> None:
        """Have it out of every pod, since what is in a pod's cgroup dies with the pod."""
        (cgroups.mount_point() / "cgroup.procs").write_text(str(self.process.pid))
        self.place = None

    def make(
        self,
        place: Place,
        uid: int,
        family: int,
        kind: int = socket.SOCK_STREAM,
        proto: int = 0,
        *,
        gid: int = 0,
    ) -> socket.socket:
        """A new socket of that pod; raises what socket(2) there did."""
        wanted = {
            "move": self.place is not place,
            "netns": str(place.netns.path),
            "cgroup": str(place.cgroup),
            "uid": uid,
            "gid": gid,
            "family": family,
            "type": kind,
            "protocol": proto,
        }
        self.place = place
        self.channel.send(json.dumps(wanted).encode())
        answer, fds, _, _ = socket.recv_fds(self.channel, traffic.MAX_REQUEST, 1)
        error = json.loads(answer)["errno"]
        if error:
            self.place = None
            raise OSError(error, os.strerror(error))
        made = socket.socket(fileno=fds[0])
        made.settimeout(TIMEOUT_S)
        return made


@dataclass(eq=False)
class LightPod:
    """One cgroup, one namespace; `record` is what the programs know of it."""

    node: LightNode
    name: str
    netns: NetNamespace
    cgroup: Path
    ip: str
    record: abi.Pod

    def new_socket(
        self,
        *,
        uid: int = APP_UID,
        family: int = socket.AF_INET,
        kind: int = socket.SOCK_STREAM,
        proto: int = 0,
    ) -> socket.socket:
        """A socket of this pod, with a time-out."""
        return self.node.maker.make(self, uid, family, kind, proto)

    def listen(
        self,
        port: int = 8080,
        host: str = "0.0.0.0",
        *,
        uid: int = APP_UID,
        proto: int = 0,
        backlog: int = 128,
    ) -> socket.socket:
        """A listening socket of this pod."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        made = self.new_socket(uid=uid, family=family, proto=proto)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen(backlog)
        return made

    def connect(
        self,
        to: tuple[str, int],
        *,
        uid: int = PROXY_UID,
        source: tuple[str, int] | None = None,
        proto: int = 0,
    ) -> socket.socket:
        """A connected socket of this pod."""
        family = socket.AF_INET6 if ":" in to[0] else socket.AF_INET
        made = self.new_socket(uid=uid, family=family, proto=proto)
        if source:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(source)
        try:
            made.connect(to)
        except BaseException:
            made.close()
            raise
        return made

    def popen(self, argv: Sequence[str | Path], *, uid: int = APP_UID) -> subprocess.Popen[bytes]:
        """A process in this pod, with pipes for stdin and stdout."""
        return subprocess.Popen(
            within(argv, netns=self.netns.path, cgroup=self.cgroup, user=str(uid)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def command(self, line: str) -> None:
        """A command of the administrator in this pod's namespace; must succeed."""
        with self.netns.entered():
            subprocess.run(line.split(), check=True, capture_output=True)

    def sysctl(self, name: str, value: object) -> None:
        """Set a network sysctl of this pod's namespace."""
        with self.netns.entered():
            Path("/proc/sys", *name.split(".")).write_text(str(value))

    def write_record(self) -> None:
        """What ADD does: tell the programs of this pod."""
        key = abi.CgroupStorageKey(self.cgroup.stat().st_ino, bpfsys.CGROUP_SOCK_OPS, 0)
        bpfsys.map_update(self.node.programs.fds[pins.PODS], bytes(key), bytes(self.record))

    def attach(self) -> None:
        with self._cgroup_fd() as fd:
            bpfsys.prog_attach(self.node.programs.fds["tb_sock_ops"], fd)
        self.write_record()

    def detach(self) -> None:
        with self._cgroup_fd() as fd:
            bpfsys.prog_detach(self.node.programs.fds["tb_sock_ops"], fd)

    @contextmanager
    def _cgroup_fd(self) -> Iterator[int]:
        with bpfsys.closing(os.open(self.cgroup, os.O_RDONLY | os.O_DIRECTORY)) as fd:
            yield fd

    def counters(self) -> dict[str, stats.HopCounters]:
        """This pod's counters by hop."""
        lookup = functools.partial(bpfsys.map_lookup, self.node.programs.fds[pins.COUNTERS])
        return stats.pod_counters(self.record.id, lookup)

    def tcp_ext(self, name: str) -> int:
        """What its TCP has counted: a TcpExt counter of its namespace."""
        with self.netns.entered():
            lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
        header, values = (line.split() for line in lines if line.startswith("TcpExt:"))
        return int(values[header.index(name)])

    def total(self) -> stats.HopCounters:
        """This pod's counters, all hops together."""
        return sum(self.counters().values(), stats.HopCounters())


@dataclass(eq=False)
class LightNode:
    """Loaded programs, and pods on one bridge."""

    name: str
    programs: Programs
    cgroup: Path
    switch: NetNamespace
    maker: Maker

    @contextmanager
    def pod(
        self,
        ip: str,
        *,
        accelerated: bool = True,
        excluded: Sequence[tuple[int, int]] = (),
        flags: int = 0,
        wired: bool = True,
        cgroup: Path | None = None,
    ) -> Iterator[LightPod]:
        """A pod with that address; `wired` puts it on the bridge, else it has loopback only.

        cgroup is one that exists already, when the pod is not to have one of its own.
        """
        number = next(_numbers)
        record = abi.Pod(
            id=os.getpid() << 20 | number + 1,
            flags=flags,
            proxy_uid=PROXY_UID,
            ip_count=1,
            excluded_count=len(excluded),
        )
        record.ip[0] = address(ip)
        for slot, (first, last) in zip(record.excluded, excluded):
            slot.first, slot.last = first, last
        name = f"{self.name}-{number}"
        with ExitStack() as stack:
            space = stack.enter_context(netns.created(name))
            folder = cgroup or stack.enter_context(cgroups.made(self.cgroup / f"pod{number}"))
            if wired:
                self._wire(space, ip, number)
                # A namespace lives on for a while, and must not answer for the next with its IP.
                stack.callback(_unplug, self.switch, f"p{number}")
            pod = LightPod(self, name, space, folder, ip, record)
            if accelerated:
                pod.attach()
            stack.callback(self.maker.leave)
            yield pod

    def _wire(self, space: NetNamespace, ip: str, number: int) -> None:
        inner, outer = f"v{number}", f"p{number}"
        with self.switch.entered(), pyroute2.IPRoute() as route:
            route.link("add", ifname=outer, kind="veth", peer={"ifname": inner})
            (bridge,) = route.link_lookup(ifname=BRIDGE)
            (index,) = route.link_lookup(ifname=outer)
            route.link("set", index=index, state="up", master=bridge)
            (index,) = route.link_lookup(ifname=inner)
            route.link("set", index=index, net_ns_fd=str(space.path))
        _plug_in(space, inner, ip)

    def wire(self, left: LightPod, right: LightPod) -> None:
        """A wire between two pods that are not on the bridge, each with its own address."""
        ends = f"l{next(_numbers)}", f"r{next(_numbers)}"
        with self.switch.entered(), pyroute2.IPRoute() as route:
            route.link("add", ifname=ends[0], kind="veth", peer={"ifname": ends[1]})
            for end, pod in zip(ends, (left, right)):
                (index,) = route.link_lookup(ifname=end)
                route.link("set", index=index, net_ns_fd=str(pod.netns.path))
        for end, pod in zip(ends, (left, right)):
            _plug_in(pod.netns, end, pod.ip)

    def visit(self, *pods: LightPod) -> None:
        """A pass over this process, which has the tests' sockets open, and over those of pods."""
        passes.visit_process(self.programs.fds[VISIT], os.getpid())
        for pod in pods:
            passes.visit_pod(self.programs.fds[VISIT], pod.cgroup)

    def pending(self, but: Sequence[tuple[int, int]] = ()) -> list[tuple[int, int]]:
        """The connections being set up: first data byte of the client and of the server.

        Those that broke off stay in the LRU map: `but` are the ones of earlier tests.
        """
        keys = _keys(self.programs.fds["halves"], HALF_KEY.size)
        earlier = set(but)
        return [pair for key in keys if (pair := HALF_KEY.unpack(key)) not in earlier]

    def sockets(self) -> int:
        """How many sockets are in the sockhash."""
        return len(_keys(self.programs.fds[pins.SOCKHASH], 8))

    def pause(self, paused: bool) -> None:
        """From the next message on, all bytes go by TCP, or again may not."""
        self._control(abi.CONTROL_PAUSED if paused else 0)

    def _control(self, flags: int) -> None:
        control = bytes(abi.Control(flags, 0))
        bpfsys.map_update(self.programs.fds[pins.CONTROL], bytes(4), control)

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """For as long as the context lasts, every visit takes sockets out of the sockhash."""
        self._control(abi.CONTROL_LEAVE)
        try:
            yield
        finally:
            self._control(0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For as long as the context lasts."""
        self.pause(True)
        try:
            yield
        finally:
            self.pause(False)


def _unplug(switch: NetNamespace, ifname: str) -> None:
    with switch.entered(), pyroute2.IPRoute() as route:
        for index in route.link_lookup(ifname=ifname):  # none when the pod's end has gone
            route.link("del", index=index)


def _plug_in(space: NetNamespace, ifname: str, ip: str) -> None:
    with space.entered(), pyroute2.IPRoute() as route:
        (index,) = route.link_lookup(ifname=ifname)
        route.link("set", index=index, ifname="eth0")
        route.addr("add", index=index, address=ip, prefixlen=16)
        route.link("set", index=index, state="up")
        route.route("add", dst="0.0.0.0/0", oif=index)


def _keys(map_fd: int, size: int) -> list[bytes]:
    key = ctypes.create_string_buffer(size)
    found = []
    missing = lib.bpf_get_first_key(map_fd, key, size)
    while not missing:
        found.append(key.raw)
        missing = lib.bpf_get_next_key(map_fd, key, key)
    return found


def address(ip: str) -> abi.Addr:
    """An address as the record has it."""
    packed = ipaddress.ip_address(ip).packed
    mapped = packed if len(packed) == 16 else b"\0" * 10 + b"\xff\xff" + packed
    return abi.Addr.from_buffer_copy(mapped)


@contextmanager
def node(limits: Limits = LIMITS, *extra_flags: str) -> Iterator[LightNode]:
    """A node with our programs loaded; everything is gone on leaving, or when the next is made."""
    _remove_dead()
    name = f"tl-{os.getpid()}-{next(_numbers)}"
    with ExitStack() as stack:
        programs = stack.enter_context(closing(Programs(limits, extra_flags)))
        cgroup = stack.enter_context(cgroups.made(cgroups.mount_point() / name))
        switch = stack.enter_context(netns.created(f"{name}-switch"))
        with switch.entered(), pyroute2.IPRoute() as route:
            route.link("add", ifname=BRIDGE, kind="bridge")
            (index,) = route.link_lookup(ifname=BRIDGE)
            route.link("set", index=index, state="up")
        maker = stack.enter_context(socket_maker())
        made = LightNode(name, programs, cgroup, switch, maker)
        _nodes.append(made)
        try:
            yield made
        finally:
            _nodes.remove(made)


def _remove_dead() -> None:
    """What the nodes of a process left that was killed."""
    for folder in cgroups.mount_point().glob("tl-*-*"):
        pid = folder.name.split("-")[1]
        if not Path("/proc", pid).exists():
            cgroups.remove(folder)
            for name in netns.names(f"{folder.name}-"):
                netns.remove(name)


@contextmanager
def socket_maker() -> Iterator[Maker]:
    """The process that makes sockets in pods, for as long as the context lasts."""
    ours, theirs = socket.socketpair()
    argv = [sys.executable, "-I", "-S", traffic.__file__]
    process = subprocess.Popen(argv, stdin=theirs.fileno(), start_new_session=True)
    theirs.close()
    try:
        yield Maker(process, ours)
    finally:
        ours.close()
        process.wait()


@contextmanager
def connected(
    client: LightPod,
    server: LightPod,
    *,
    to: tuple[str, int] | None = None,
    client_uid: int = PROXY_UID,
    server_uid: int = APP_UID,
    source: tuple[str, int] | None = None,
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection to port 8080 of the server, (client's end, server's end), closed on leaving."""
    with server.listen(uid=server_uid) as listener:
        made = client.connect(to or (server.ip, 8080), uid=client_uid, source=source)
        taken = accepted(listener)
    with made, taken:
        yield made, taken


def accepted(listener: socket.socket) -> socket.socket:
    """The next connection of a listener, with a time-out; accepted by the listener's own user."""
    listener.settimeout(TIMEOUT_S)
    with _as_user(os.fstat(listener.fileno()).st_uid):
        taken, _ = listener.accept()
    taken.settimeout(TIMEOUT_S)
    return taken


@contextmanager
def _as_user(uid: int) -> Iterator[None]:
    """The sockets that this thread makes meanwhile are that user's."""
    libc = ctypes.CDLL(None)
    before = libc.setfsuid(uid)
    try:
        yield
    finally:
        libc.setfsuid(before)


def visit() -> None:
    """A pass over this process, by the programs of each node that it has."""
    for each in _nodes:
        each.visit()


def exchange(left: socket.socket, right: socket.socket, *, rounds: int = 4) -> int:
    """Send random bytes to and fro, checking each; returns how many went in all.

    First the ends get to know each other, and a pass lets both join.
    """
    total = 0
    for number in range(-ACQUAINTANCE, rounds):
        for sender, receiver in ((left, right), (right, left)):
            data = os.urandom(1 + 700 * max(0, number))
            sender.sendall(data)
            assert receive(receiver, len(data)) == data, f"round {number} from {sender}"
            total += len(data)
        if number == -1:
            visit()
            total += consume(left, right) + consume(right, left)
    return total


def consume(sender: socket.socket, receiver: socket.socket) -> int:
    """The first message after a peer has joined goes by TCP, and must be consumed."""
    sender.sendall(b"j")
    assert receive(receiver, 1) == b"j"
    return 1


def talk_all(pairs: Sequence[tuple[socket.socket, socket.socket]], *, rounds: int = 4) -> None:
    """On all connections at once, each end says what only it can say, and hears the other's."""
    for number in range(-ACQUAINTANCE, rounds):
        for who, pair in enumerate(pairs):
            for side, sock in enumerate(pair):
                sock.sendall(f"round {number}, connection {who}, side {side}".encode())
        for who, pair in enumerate(pairs):
            for side, sock in enumerate(pair):
                wanted = f"round {number}, connection {who}, side {1 - side}".encode()
                assert receive(sock, len(wanted)) == wanted
        if number == -1:
            visit()


def reset(sock: socket.socket) -> None:
    """Close it with an RST: its port is free at once."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def disconnect(sock: socket.socket) -> None:
    """connect(AF_UNSPEC), which Python's socket module does not offer."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.connect(sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16):
        raise OSError(ctypes.get_errno(), "connect(AF_UNSPEC)")


def receive(sock: socket.socket, size: int) -> bytes:
    """Exactly so many bytes, fewer only at the end of the stream."""
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def read_to_end(sock: socket.socket) -> bytes:
    """Everything until the peer's FIN."""
    data = b""
    while more := sock.recv(1 << 20):
        data += more
    return data


def eventually(predicate: Callable[[], bool], patience_s: float = 30.0) -> bool:
    """Whether it becomes true in time: counters follow within a jiffy, closing sockets sooner."""
    deadline = time.monotonic() + patience_s
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def outcomes(*pods: LightPod) -> dict[str, int]:
    """What became of the connections of these pods, added up."""
    return sum((pod.total() for pod in pods), stats.HopCounters()).connections


def bypassed(*pods: LightPod) -> int:
    """The bytes that these pods sent by bypass."""
    return sum(pod.total().bypassed_bytes for pod in pods)
