# SPDX-License-Identifier: Apache-2.0
"""Round trips on each hop of a request, by message size, and AF_UNIX as the limit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.bed import Pod, cc, open_bed, pairs, pingpong
from tests.bed.addresses import Family
from tests.bed.cni import DUAL_STACK
from tests.bed.pairs import Pair
from tests.bed.pingpong import HOPS, Hop
from tests.bed.pod import APP
from tests.bench.bench import Bench, Effort

KEPT_US = 1_000  # longer round trips stay out of the plots' histograms, not out of the percentiles


@dataclass(frozen=True)
class Plan:
    """How much to measure; rounds of messages of at most 4 KB, a third of them for longer ones."""

    sizes: tuple[int, ...]
    families: tuple[Family, ...]
    rounds: int
    pairs: int


PLANS: dict[Effort, Plan] = {
    "full": Plan((1, 64, 256, 1024, 4096, 16_384, 65_536), ("v4", "v6"), 10_000, 7),
    "quick": Plan((64, 16_384), ("v4",), 5_000, 3),
    "smoke": Plan((64,), ("v4",), 50, 1),
}


@dataclass(frozen=True)
class Way:
    """Where messages go there and back, and under which name."""

    case: str
    variant: str
    hop: Hop


def unix(pod: Pod) -> Hop:
    """Two processes of one pod over AF_UNIX, which is as far as the paper says one could get."""
    name = "@tcpip-bypass-bench"
    return Hop(pod, APP, "@", name, 0, pod, APP, name, 0)


def run(bench: Bench) -> None:
    """Measure everything that the plan says."""
    plan = PLANS[bench.effort]
    with open_bed(subnets=DUAL_STACK) as bed, pairs.pairs(bed) as both:
        program = cc.compiled(pingpong.SOURCE, bed.folder)
        for family in plan.families:
            for size in plan.sizes:
                ways = _ways(both, family)
                if family == "v4":
                    ways.append(Way("unix", "unix", unix(both[0].client)))
                _measure(bench, plan, program, ways, size)
        bench.keep_counters(bed, both[1])


def _ways(both: tuple[Pair, Pair], family: Family) -> list[Way]:
    return [
        Way(f"{name}/{family}", pair.kind, pingpong.hop(name, pair.client, pair.server, family))
        for name in HOPS
        for pair in both
    ]


def _measure(bench: Bench, plan: Plan, program: Path, ways: list[Way], size: int) -> None:
    rounds = plan.rounds if size <= 4096 else plan.rounds // 3
    with ExitStack() as stack:
        for way in ways:
            stack.enter_context(pingpong.serving(program, way.hop, bench.cpu, size))
        for number, way in pairs.alternated(ways, plan.pairs):
            trips = pingpong.measure(program, way.hop, bench.cpu, size=size, rounds=rounds)
            microseconds = (each / 1e3 for each in trips.nanoseconds)
            bench.record(
                f"{way.case}/{size}",
                way.variant,
                number,
                {"median_us": trips.median_us, "p99_us": trips.p99_us},
                [each for each in microseconds if each < KEPT_US],
            )
    for case in dict.fromkeys(way.case for way in ways if way.variant == "plain"):
        bench.tell(f"{case}/{size}", "median_us", "p99_us")
