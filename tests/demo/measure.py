"""What the demo measures: two meshes alike but for one annotation, loaded in turn."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.bed import OPTED_OUT, Bed, Pod, mesh, pingpong, wrk
from tests.bed.netns import LinkCounters
from tests.bed.pingpong import HOPS, HopName
from tests.bed.wrk import Load

Kind = Literal["plain", "bypass"]
KINDS: tuple[Kind, ...] = ("plain", "bypass")
RUNS = 5
CONNECTIONS = (1, 8, 32)
SECONDS = 2
WARMUP_SECONDS = 1
STEPS = RUNS * len(KINDS) * (len(HOPS) + len(CONNECTIONS)) + len(KINDS)

Tell = Callable[[str], None]  # takes one line about a step that has just been done


@dataclass(frozen=True)
class Pair:
    """A client's and a server's pod, both accelerated or neither."""

    kind: Kind
    client: Pod
    server: Pod

    def cpu_seconds(self) -> float:
        return self.client.cpu_seconds() + self.server.cpu_seconds()

    def links(self, ifname: str) -> LinkCounters:
        """The counters of one interface, both pods' added up."""
        return self.client.netns.link_counters(ifname) + self.server.netns.link_counters(ifname)


@dataclass(frozen=True)
class HopRun:
    """One series of round trips; microseconds."""

    kind: Kind
    hop: HopName
    median_us: float
    p99_us: float


@dataclass(frozen=True)
class LoadRun:
    """One run of wrk, with the CPU time and the packets of both pods while it ran."""

    kind: Kind
    connections: int
    load: Load
    cpu_s: float
    foreign_s: float  # CPU time that anybody else took on the CPU meanwhile
    veth: LinkCounters
    loopback: LinkCounters

    @property
    def requests_per_cpu_second(self) -> float:
        return self.load.requests / self.cpu_s


@dataclass(frozen=True)
class Bytes:
    """A hop's payload as the BPF programs counted it at both ends."""

    bypassed: int
    by_tcp: int

    @property
    def share(self) -> float:
        """The part that bypassed TCP/IP, 0 to 1."""
        total = self.bypassed + self.by_tcp
        return self.bypassed / total if total else 0.0


@dataclass
class Measurements:
    """Everything the demo found out."""

    hops: list[HopRun] = field(default_factory=list)
    loads: list[LoadRun] = field(default_factory=list)
    payload: dict[str, Bytes] = field(default_factory=dict)  # by hop; only the accelerated mesh
    status: dict[str, Any] = field(default_factory=dict)  # the node program's, at the end


@contextmanager
def pairs(bed: Bed) -> Iterator[tuple[Pair, Pair]]:
    """A pair whose pods opted out, and one whose pods are accelerated."""
    with ExitStack() as stack:

        def pair(kind: Kind) -> Pair:
            annotations = OPTED_OUT if kind == "plain" else {}
            client, server = (
                stack.enter_context(bed.pod(f"{kind}-{role}", annotations=annotations))
                for role in ("client", "server")
            )
            return Pair(kind, client, server)

        both = pair("plain"), pair("bypass")
        payload(bed, both)  # says now, not in a minute, when the plugin has let the pods be
        yield both


def alternated(both: tuple[Pair, Pair]) -> Iterator[Pair]:
    """For each run the two pairs in turn, every other run in the other order."""
    orders = itertools.cycle((both, both[::-1]))
    for pair_order in itertools.islice(orders, RUNS):
        yield from pair_order


def measure_hops(
    bed: Bed, both: tuple[Pair, Pair], cpu: str, found: Measurements, tell: Tell
) -> None:
    """Round trips of 64 bytes on each hop, a small C program standing in for the proxies."""
    program = pingpong.compiled(bed.folder)
    for name in HOPS:
        for pair in alternated(both):
            hop = pingpong.hop(name, pair.client, pair.server)
            with pingpong.serving(program, hop, cpu):
                trips = pingpong.measure(program, hop, cpu)
            run = HopRun(pair.kind, name, trips.median_us, trips.p99_us)
            found.hops.append(run)
            tell(f"{name:9} {pair.kind:7} round trip {run.median_us:5.1f} us")


def measure_mesh(
    bed: Bed, both: tuple[Pair, Pair], cpu: str, found: Measurements, tell: Tell
) -> None:
    """The same load on both meshes, one after the other, never at once."""
    before = payload(bed, both)
    with ExitStack() as stack:
        for pair in both:
            stack.enter_context(mesh.running(pair.client, pair.server, {}, cpus=cpu))
            load(pair, 8, WARMUP_SECONDS, cpu)
            tell(f"mesh      {pair.kind:7} two Envoys and nginx are up and warm")
        for connections in CONNECTIONS:
            for pair in alternated(both):
                run = load(pair, connections, SECONDS, cpu)
                found.loads.append(run)
                tell(
                    f"mesh      {pair.kind:7} at {connections:2}: "
                    f"median {run.load.latency_us(50):5} us, {run.requests_per_cpu_second:6.0f} "
                    "requests per CPU-second"
                )
        after = payload(bed, both)
    found.payload = {
        hop: Bytes(
            after[hop].bypassed - before[hop].bypassed, after[hop].by_tcp - before[hop].by_tcp
        )
        for hop in after
    }
    found.status = bed.node.status()


def load(pair: Pair, connections: int, seconds: int, cpu: str) -> LoadRun:
    """One run of wrk through a mesh."""
    url = f"{mesh.SERVICE_URL}/answer"
    veth, loopback = pair.links("eth0"), pair.links("lo")
    busy_s, cpu_s = busy_seconds(cpu), pair.cpu_seconds()
    done = wrk.run(pair.client, url, connections=connections, seconds=seconds, cpus=cpu)
    busy_s, cpu_s = busy_seconds(cpu) - busy_s, pair.cpu_seconds() - cpu_s
    return LoadRun(
        pair.kind,
        connections,
        done,
        cpu_s,
        max(0.0, busy_s - cpu_s),
        pair.links("eth0") - veth,
        pair.links("lo") - loopback,
    )


def busy_seconds(cpu: str) -> float:
    """Time that a CPU was not idle since boot, in the ticks of /proc/stat."""
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{cpu}":
            user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, ticks)
            return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    raise LookupError(f"/proc/stat has no cpu{cpu}")


def payload(bed: Bed, both: tuple[Pair, Pair]) -> dict[str, Bytes]:
    """The payload counted so far by hop, over both accelerated pods; "none" is what no pair owned.

    Raises:
        RuntimeError: the node program does not know the pods, so nothing can have bypassed.
    """
    accelerated = both[1]
    names = {accelerated.client.name, accelerated.server.name}
    pods = [pod for pod in bed.node.status()["pods"] if pod["name"] in names]
    if len(pods) != len(names):
        said = "\n".join(bed.chain.said)
        raise RuntimeError(f"the plugin has not accelerated {', '.join(sorted(names))}:\n{said}")
    sums = {}
    for hop in (*HOPS, "none"):
        counters = [pod["hops"][hop] for pod in pods if hop in pod["hops"]]
        sums[hop] = Bytes(
            sum(counter["bypassed_bytes"] for counter in counters),
            sum(counter["tcp_bytes"] for counter in counters),
        )
    return sums
