# SPDX-License-Identifier: Apache-2.0
"""Round trips on each hop of a request, by message size, and AF_UNIX as the limit.

Between event loops, once the connection has joined; and between ends that sleep in recv, which stay
on TCP and must lose nothing.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.bed import Pod, ends, pairs, pingpong
from tests.bed.addresses import Family
from tests.bed.cni import DUAL_STACK
from tests.bed.pairs import Pair
from tests.bed.pingpong import HOPS, Hop, Reader, RoundTrips
from tests.bed.pod import APP
from tests.bench.bench import Bench, Effort

BLOCKING_SIZE = 64
KEPT_US = 1_000  # longer round trips stay out of the plots' histograms, not out of the percentiles


@dataclass(frozen=True)
class Plan:
    """How much to measure; rounds of messages of at most 4 KB, a third of them for longer ones."""

    sizes: tuple[int, ...]
    sizes_v6: tuple[int, ...]
    rounds: int
    pairs: int


PLANS: dict[Effort, Plan] = {
    "full": Plan((64, 1024, 4096, 16_384, 65_536), (64,), 10_000, 7),
    "quick": Plan((64, 16_384), (), 5_000, 3),
    "smoke": Plan((64,), (), 50, 1),
}


@dataclass(frozen=True)
class Way:
    """Where messages go there and back, and under which name."""

    case: str
    variant: str
    hop: Hop
    reader: Reader = "events"

    @property
    def joins(self) -> bool:
        return self.variant == "bypass" and self.reader == "events"


def unix(pod: Pod) -> Hop:
    """Two processes of one pod over AF_UNIX, which is as far as the paper says one could get."""
    name = "@tcpip-bypass-bench"
    return Hop(pod, APP, "@", name, 0, pod, APP, name, 0)


def run(bench: Bench) -> None:
    """Measure everything that the plan says."""
    plan = PLANS[bench.effort]
    with bench.bed(subnets=DUAL_STACK) as bed, pairs.pairs(bed) as both:
        program = ends.compiled(pingpong.SOURCE, bed.folder)
        for size in plan.sizes:
            ways = [*_ways(both, "v4"), Way("unix", "unix", unix(both[0].client))]
            _measure(bench, plan, program, ways, size)
        for size in plan.sizes_v6:
            _measure(bench, plan, program, _ways(both, "v6"), size)
        _measure(bench, plan, program, _blocking(both), BLOCKING_SIZE)
        bench.keep_counters(bed, both[1])


def _ways(both: tuple[Pair, Pair], family: Family) -> list[Way]:
    return [
        Way(f"{name}/{family}", pair.kind, pingpong.hop(name, pair.client, pair.server, family))
        for name in HOPS
        for pair in both
    ]


def _blocking(both: tuple[Pair, Pair]) -> list[Way]:
    """Both ends sleep in recv."""
    return [
        Way(
            "inbound/blocking",
            pair.kind,
            pingpong.hop("inbound", pair.client, pair.server),
            "blocking",
        )
        for pair in both
    ]


def values(trips: RoundTrips) -> dict[str, float]:
    """What is kept of a run; how long it took to join, where it has."""
    found = {"median_us": trips.median_us, "p99_us": trips.p99_us}
    return found if trips.joined_ms is None else {**found, "joined_ms": trips.joined_ms}


def _measure(bench: Bench, plan: Plan, program: Path, ways: list[Way], size: int) -> None:
    rounds = plan.rounds if size <= 4096 else plan.rounds // 3
    with ExitStack() as stack:
        for way in ways:
            serving = pingpong.serving(program, way.hop, bench.cpu, size, way.reader)
            stack.enter_context(serving)
        for number, way in pairs.alternated(ways, plan.pairs):
            trips = pingpong.measure(
                *(program, way.hop, bench.cpu),
                size=size,
                rounds=rounds,
                reader=way.reader,
                joins=way.joins,
            )
            microseconds = (each / 1e3 for each in trips.nanoseconds)
            bench.record(
                f"{way.case}/{size}",
                way.variant,
                number,
                values(trips),
                [each for each in microseconds if each < KEPT_US],
            )
    for case in dict.fromkeys(way.case for way in ways if way.variant == "plain"):
        bench.tell(f"{case}/{size}", "median_us", "p99_us", "joined_ms")
