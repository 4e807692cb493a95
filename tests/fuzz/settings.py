# SPDX-License-Identifier: Apache-2.0
"""Where the fuzzer's traffic runs: what both settings of the bypass have in common, and each."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

from bpf import abi
from bpf.loader import VISIT, Programs
from bpf.stats import HopCounters
from cni_plugin import names
from install.program import commands, passes, report
from install.program.generations import Generations
from install.program.node import Node
from tests.bed import Bed, Pod, congestion, kubeproxy, open_bed, pingpong
from tests.bed.addresses import Family
from tests.bed.cni import DUAL_STACK
from tests.bed.istio import Interception
from tests.bed.pingpong import Hop, HopName
from tests.bed.pod import within
from tests.light import CLIENT_IP, LIMITS, SERVER_IP, LightPod, accelerated

SOURCE = Path(__file__).with_name("stream.c")
LOOPBACK = "loopback"
RETIRING_PASSES = 100  # over old programs
HOPS = pingpong.HOPS
ACCELERATED = {names.ENABLED: "true"}
# Pods by kind: how their TCP is intercepted, and the annotations of the client's and the server's.
KINDS: dict[str, tuple[Interception | None, dict[str, str], dict[str, str]]] = {
    "mesh": (Interception(), {}, {}),
    "tproxy": (Interception("TPROXY"), {}, {}),
    "proxy-only": (Interception(), {}, {names.PROXY_ONLY: "true"}),
    "plain": (None, ACCELERATED, ACCELERATED),
    "excluded": (None, ACCELERATED, {**ACCELERATED, names.EXCLUDE_PORTS: "9000,8081-8082"}),
    "opted-out": (None, ACCELERATED, {}),
}
SUFFIXES: dict[Family, str] = {"v4": "", "v6": "6", "mapped": "-mapped"}


@dataclass(frozen=True)
class Way:
    """Between which pods a route leads, over which hop, in which family."""

    kind: str
    hop: HopName
    family: Family


def _ways() -> Iterator[tuple[str, Way]]:
    for family, suffix in SUFFIXES.items():
        for hop_name in (*HOPS, *pingpong.PLAIN_HOPS):
            kind = "mesh" if hop_name in HOPS else "plain"
            yield f"{hop_name}{suffix}", Way(kind, hop_name, family)
        yield f"tproxy{suffix}", Way("tproxy", "sidecars", family)
        for kind in ("excluded", "opted-out"):
            yield f"{kind}{suffix}", Way(kind, "direct", family)
        yield f"proxy-only{suffix}", Way("proxy-only", "inbound", family)


WAYS = {name: way for name, way in _ways() if name != "service-mapped"}  # has the IP of service


@dataclass(frozen=True)
class Route:
    """Where the servers listen and how the clients reach them. The second port is that of the
    listener with TCP_DEFER_ACCEPT, 0 if there is none."""

    source: str
    target: str
    ports: tuple[int, int]
    listen: str
    listen_ports: tuple[int, int]


class Setting(Protocol):
    """A place where both ends of the traffic are accelerated."""

    @property
    def routes(self) -> Mapping[str, Route]:
        """By name; traffic goes over all of them at once."""

    def spawn(self, name: str, argv: list[str], *, serves: bool) -> subprocess.Popen[str]:
        """Starts one end of the traffic on a route, its standard output a pipe."""

    @property
    def pods(self) -> Sequence[str]:
        """Those that can be paused by themselves, as NAMESPACE/NAME."""

    def pause(self, paused: bool, pod: str | None = None) -> None:
        """Switches the whole bypass, or one pod's, off or on again."""

    def leave(self, leaving: bool) -> None:
        """Takes all sockets out of the sockhash, or lets them join again."""

    def reload(self) -> None:
        """Loads the programs anew over the running ones."""

    def counters(self) -> HopCounters:
        """What the programs have counted since the setting was made."""

    def sockets(self, name: str, port: int) -> str:
        """What the kernel says of the sockets of a client port on a route (ss -tmi)."""


def compiled(folder: Path) -> Path:
    """Compiles stream.c into the folder and returns the program's path."""
    program = folder / "stream"
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run(["gcc", *flags, "-o", program, SOURCE], check=True)
    return program


def free_ports(count: int) -> tuple[int, ...]:
    """Ports of SERVER_IP that nobody uses at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind((SERVER_IP, 0))
        return tuple(sock.getsockname()[1] for sock in sockets)
    finally:
        for sock in sockets:
            sock.close()


def socket_states(port: int) -> str:
    """ss -tmi for a port of the calling thread's network namespace."""
    if not shutil.which("ss"):
        return "no ss on this machine"
    argv = ["ss", "-tanmi", f"( sport = :{port} or dport = :{port} )"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


class Loopback:
    """One cgroup, client and server on loopback: needs neither pods nor the plugin."""

    pods: Sequence[str] = ()

    def __init__(self, pod: LightPod) -> None:
        self._pod = pod
        self._flags = 0
        self._before = HopCounters()  # of the programs that were replaced
        self._switching = threading.Lock()
        first, second = free_ports(2)
        ports = (first, second)
        self.routes = {LOOPBACK: Route(CLIENT_IP, SERVER_IP, ports, SERVER_IP, ports)}

    def spawn(self, name: str, argv: list[str], *, serves: bool) -> subprocess.Popen[str]:  # noqa: ARG002
        command = within(argv, cgroup=self._pod.folder)
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def pause(self, paused: bool, pod: str | None = None) -> None:  # noqa: ARG002
        self._set(abi.CONTROL_PAUSED, paused)

    def leave(self, leaving: bool) -> None:
        self._set(abi.CONTROL_LEAVE, leaving)

    def _set(self, flag: int, wanted: bool) -> None:
        with self._switching:
            self._flags = self._flags | flag if wanted else self._flags & ~flag
            self._pod.control(self._flags)

    def reload(self) -> None:
        """The sockets leave the old programs, as far as their queues get empty meanwhile."""
        programs, old = Programs(LIMITS), self._pod.programs
        with self._switching:
            # What the old programs' sockets count from now on is missed.
            self._before += self._pod.total()
            self._pod.control(self._flags | abi.CONTROL_LEAVE)
            self._pod.reload(programs)
            self._pod.control(self._flags)
        for _ in range(RETIRING_PASSES):
            self._pass(old.fds[VISIT])
        old.close()

    def _pass(self, visit: int) -> None:
        """One pass, as soon as the new programs' are not at it."""
        while True:
            with contextlib.suppress(BlockingIOError):
                passes.visit_pod(visit, self._pod.folder)
                return
            time.sleep(0.001)

    def counters(self) -> HopCounters:
        return self._before + self._pod.total()

    def sockets(self, name: str, port: int) -> str:  # noqa: ARG002
        return socket_states(port)


@contextmanager
def loopback(programs: Programs | None = None) -> Iterator[Loopback]:
    """The light setting; `programs` replaces the product's, for instance by a mutant."""
    with accelerated(programs) as pod:
        yield Loopback(pod)


@dataclass
class Pods:
    """Pods on a node of their own; the routes are hops between them."""

    bed: Bed
    hops: Mapping[str, Hop]
    routes: Mapping[str, Route] = field(init=False)
    _before: HopCounters = field(default_factory=HopCounters)

    def __post_init__(self) -> None:
        self.routes = {name: self._route(hop) for name, hop in self.hops.items()}

    @property
    def _node(self) -> Node:
        return Node(self.bed.node.bpffs, self.bed.node.state_dir)

    @staticmethod
    def _route(hop: Hop) -> Route:
        # Where the ports differ, iptables lead every port to the one listener.
        deferred = hop.port + 1 if hop.port == hop.listen_port else 0
        return Route(
            *(hop.source, hop.destination, (hop.port, deferred)),
            *(hop.listen, (hop.listen_port, deferred)),
        )

    def spawn(self, name: str, argv: list[str], *, serves: bool) -> subprocess.Popen[str]:
        hop = self.hops[name]
        pod, container = hop.asker, hop.asker_container
        if serves:
            pod, container = hop.server, hop.server_container
        return pod.spawn(argv, container=container, stdout=subprocess.PIPE)

    @cached_property
    def pods(self) -> Sequence[str]:
        accelerated = report.report(self._node)["pods"]
        return [f"{pod['namespace']}/{pod['name']}" for pod in accelerated]

    def pause(self, paused: bool, pod: str | None = None) -> None:
        # In this process: the node program takes a second to start, and this is done all the time.
        (commands.pause if paused else commands.resume)(self._node, pod)

    def leave(self, leaving: bool) -> None:
        current = Generations(self.bed.node.bpffs).current()
        assert current is not None
        others = current.flags() & ~abi.CONTROL_LEAVE
        current.set_flags(others | (abi.CONTROL_LEAVE if leaving else 0))

    def reload(self) -> None:
        counted = self.counters()
        self.bed.node.load()
        if not report.report(self._node)["older_generations"]:
            self._before = counted  # had no connection left: gone, and its counters with it

    def counters(self) -> HopCounters:
        total = self._before
        for pod in report.report(self._node)["pods"]:
            for counted in pod["hops"].values():
                total += HopCounters(**counted)
        return total

    def bypassed(self, name: str) -> int:
        """Bytes that the pods at a route's ends have sent by bypass, on any hop."""
        ends = {self.hops[name].asker.name, self.hops[name].server.name}
        return sum(
            counted["bypassed_bytes"]
            for pod in report.report(self._node)["pods"]
            if pod["name"] in ends
            for counted in pod["hops"].values()
        )

    def sockets(self, name: str, port: int) -> str:
        ends = {self.hops[name].asker.name: self.hops[name].asker}
        ends[self.hops[name].server.name] = self.hops[name].server
        text = ""
        for pod in ends.values():
            with pod.netns.entered():
                text += f"--- pod {pod.name}\n{socket_states(port)}"
        return text


@contextmanager
def pods(wanted: Iterable[str]) -> Iterator[Pods]:
    """Pods as the runtime and the plugin make them, and ways between them by name, see WAYS."""
    with (
        congestion.allowed("bbr"),
        open_bed(subnets=DUAL_STACK) as bed,
        ExitStack() as stack,
    ):
        pairs: dict[str, tuple[Pod, Pod]] = {}
        hops = {}
        for name in wanted:
            way = WAYS[name]
            # Listeners of one pod must not want the same port.
            owner = f"{way.kind}{SUFFIXES[way.family]}" if way.hop in HOPS else name
            if owner not in pairs:
                pairs[owner] = _pair(bed, stack, owner, way)
            hops[name] = pingpong.hop(way.hop, *pairs[owner], way.family)
        yield Pods(bed, hops)


def _pair(bed: Bed, stack: ExitStack, name: str, way: Way) -> tuple[Pod, Pod]:
    interception, *annotations = KINDS[way.kind]
    client, server = (
        stack.enter_context(
            bed.pod(f"{name}-{role}", interception=interception, annotations=wanted)
        )
        for role, wanted in zip(("client", "server"), annotations)
    )
    # Reno paces as little as CUBIC, which nearly every node has; BBR's place it takes inside a pod.
    congestion.choose(client.netns, "reno")
    congestion.choose(server.netns, "bbr")
    if way.hop == "service":
        stack.enter_context(kubeproxy.service(bed.host, server, way.family))
    return client, server
