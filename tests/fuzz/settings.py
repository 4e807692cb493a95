"""Where the fuzzer's traffic runs: what both settings of the bypass have in common, and each."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from bpf.loader import Programs
from bpf.stats import HopCounters
from install import commands
from install.commands import Node
from tests.bed import Bed, open_bed
from tests.bed.pingpong import Hop, HopName, hop
from tests.light import CLIENT_IP, LIMITS, SERVER_IP, LightPod, accelerated

SOURCE = Path(__file__).with_name("stream.c")
HOPS: tuple[HopName, ...] = ("inbound", "outbound", "sidecars")
LOOPBACK = "loopback"


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

    def pause(self, paused: bool) -> None:
        """Switches the whole bypass off or on again."""

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

    def __init__(self, pod: LightPod) -> None:
        self._pod = pod
        self._paused = False
        self._before = HopCounters()  # of the programs that were replaced
        first, second = free_ports(2)
        ports = (first, second)
        self.routes = {LOOPBACK: Route(CLIENT_IP, SERVER_IP, ports, SERVER_IP, ports)}

    def spawn(self, name: str, argv: list[str], *, serves: bool) -> subprocess.Popen[str]:  # noqa: ARG002
        return subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=self._pod.enter,  # noqa: PLW1509 - writes one file, takes no lock
        )

    def pause(self, paused: bool) -> None:
        self._paused = paused
        self._pod.pause(paused)

    def reload(self) -> None:
        # What its connections count from now on is missed: they keep the old programs.
        self._before += self._pod.total()
        self._pod.reload(Programs(LIMITS))
        self._pod.pause(self._paused)

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
    """Two pods on a node of their own; the routes are the hops of a request between them."""

    bed: Bed
    hops: Mapping[str, Hop]
    routes: Mapping[str, Route] = field(init=False)
    _before: HopCounters = field(default_factory=HopCounters)

    def __post_init__(self) -> None:
        self.routes = {name: self._route(name, hop) for name, hop in self.hops.items()}

    @property
    def _node(self) -> Node:
        return Node(self.bed.node.bpffs, self.bed.node.state_dir)

    def _route(self, name: str, hop: Hop) -> Route:
        # iptables lead every port of the other two to one listener.
        deferred = hop.port + 1 if name == "inbound" else 0
        return Route(
            *(hop.source, hop.destination, (hop.port, deferred)),
            *("0.0.0.0", (hop.listen_port, deferred)),
        )

    def spawn(self, name: str, argv: list[str], *, serves: bool) -> subprocess.Popen[str]:
        hop = self.hops[name]
        pod, container = hop.asker, hop.asker_container
        if serves:
            pod, container = hop.server, hop.server_container
        return pod.spawn(argv, container=container, stdout=subprocess.PIPE)

    def pause(self, paused: bool) -> None:
        # In this process: the node program takes a second to start, and this is done all the time.
        (commands.pause if paused else commands.resume)(self._node)

    def reload(self) -> None:
        counted = self.counters()
        self.bed.node.call("load")
        if not commands.status_report(self._node)["older_generations"]:
            self._before = counted  # had no connection left: gone, and its counters with it

    def counters(self) -> HopCounters:
        total = self._before
        for pod in commands.status_report(self._node)["pods"]:
            for counted in pod["hops"].values():
                total += HopCounters(**counted)
        return total

    def sockets(self, name: str, port: int) -> str:
        ends = {self.hops[name].asker.name: self.hops[name].asker}
        ends[self.hops[name].server.name] = self.hops[name].server
        text = ""
        for pod in ends.values():
            with pod.netns.entered():
                text += f"--- pod {pod.name}\n{socket_states(port)}"
        return text


@contextmanager
def pods(names: Iterable[HopName]) -> Iterator[Pods]:
    """Two pods as the runtime and the plugin make them, and the hops between them by name."""
    with open_bed(bypass=True) as bed, bed.pod("client") as client, bed.pod("server") as server:
        yield Pods(bed, {name: hop(name, client, server) for name in names})
