# SPDX-License-Identifier: Apache-2.0
"""What the demo measures: two meshes alike but for one annotation, loaded in turn."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tests.bed import Bed, ends, mesh, pairs, pingpong, wrk
from tests.bed.addresses import Family, on_the_wire
from tests.bed.pairs import KINDS, Bytes, Cost, Kind, Pair
from tests.bed.pingpong import HOPS, HopName
from tests.bed.wrk import Load
from tests.demo.modes import Mode

RUNS = 5  # by default
CONNECTIONS = (1, 8, 32)
SECONDS = 2
WARMUP_SECONDS = 1

Tell = Callable[[str], None]  # takes one line about a step that has just been done


@dataclass(frozen=True)
class HopRun:
    """One series of round trips; microseconds."""

    kind: Kind
    hop: HopName
    median_us: float
    p99_us: float


@dataclass(frozen=True)
class LoadRun:
    """One run of wrk and what it cost both pods."""

    kind: Kind
    connections: int
    load: Load
    cost: Cost

    @property
    def requests_per_cpu_second(self) -> float:
        return self.load.requests / self.cost.cpu_s


@dataclass
class Measurements:
    """What the demo found out in one mode, each figure in so many runs."""

    mode: Mode
    runs: int = RUNS
    hops: list[HopRun] = field(default_factory=list)
    loads: list[LoadRun] = field(default_factory=list)
    payload: dict[str, Bytes] = field(default_factory=dict)  # by hop; only the accelerated mesh
    status: dict[str, Any] = field(default_factory=dict)  # the node program's, at the end

    @property
    def steps(self) -> int:
        """How many lines are told until everything is measured."""
        return self.runs * len(KINDS) * (len(HOPS) + len(CONNECTIONS)) + len(KINDS)


@dataclass(frozen=True)
class Results:
    """Everything the demo found out."""

    verdict: str  # the self-test's: the mode that `auto` stands for on this machine
    reason: str
    modes: list[Measurements]


def measure_hops(
    bed: Bed, both: tuple[Pair, Pair], cpu: str, found: Measurements, tell: Tell, *, family: Family
) -> None:
    """Round trips of 64 bytes on each hop, a small C program standing in for the proxies."""
    program = ends.compiled(pingpong.SOURCE, bed.folder)
    for name in HOPS:
        for _, pair in pairs.alternated(both, found.runs):
            hop = pingpong.hop(name, pair.client, pair.server, family)
            with pingpong.serving(program, hop, cpu):
                trips = pingpong.measure(program, hop, cpu)
            run = HopRun(pair.kind, name, trips.median_us, trips.p99_us)
            found.hops.append(run)
            tell(f"{name:9} {pair.kind:7} round trip {run.median_us:5.1f} us")


def measure_mesh(
    bed: Bed, both: tuple[Pair, Pair], cpu: str, found: Measurements, tell: Tell, *, family: Family
) -> None:
    """The same load on both meshes, one after the other, never at once."""
    before = pairs.payload(bed, both[1])
    with ExitStack() as stack:
        for pair in both:
            stack.enter_context(
                mesh.running(pair.client, pair.server, {}, cpus=cpu, family=on_the_wire(family))
            )
            load(pair, family, 8, WARMUP_SECONDS, cpu)
            tell(f"mesh      {pair.kind:7} two Envoys and nginx are up and warm")
        for connections in CONNECTIONS:
            for _, pair in pairs.alternated(both, found.runs):
                run = load(pair, family, connections, SECONDS, cpu)
                found.loads.append(run)
                tell(
                    f"mesh      {pair.kind:7} at {connections:2}: "
                    f"median {run.load.latency_us(50):5} us, {run.requests_per_cpu_second:6.0f} "
                    "requests per CPU-second"
                )
        after = pairs.payload(bed, both[1])
    found.payload = {
        hop: Bytes(
            after[hop].bypassed - before[hop].bypassed, after[hop].by_tcp - before[hop].by_tcp
        )
        for hop in after
    }
    found.status = bed.node.status()


def load(pair: Pair, family: Family, connections: int, seconds: int, cpu: str) -> LoadRun:
    """One run of wrk through a mesh."""
    url = f"{mesh.service_url(family)}/answer"
    done, cost = pairs.measured(
        pair,
        cpu,
        lambda: wrk.run(pair.client, url, connections=connections, seconds=seconds, cpus=cpu),
    )
    return LoadRun(pair.kind, connections, done, cost)
