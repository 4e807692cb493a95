# SPDX-License-Identifier: Apache-2.0
"""Short connections: connect, one request of 64 bytes, one answer, close.

A connection is looked at after 32 segments, so these stay on TCP: what they pay for the programs is
measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from tests.bed import Bed, ends, pairs, pingpong
from tests.bed.pairs import Pair
from tests.bed.pingpong import HOPS, Hop, HopName
from tests.bench.bench import Bench, Effort
from tests.bench.hops import Way

REQUEST = 64
SOURCE = Path(__file__).with_suffix(".c")


@dataclass(frozen=True)
class Times:
    """Of one run, in milliseconds."""

    warmup: int
    measured: int


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    times: Times
    pairs: int


@dataclass(frozen=True)
class Answer:
    """How many bytes answer a request, in writes of how many, and from which CPU."""

    size: int
    write: int
    cpu: str


PLANS: dict[Effort, Plan] = {
    "full": Plan(Times(100, 500), 11),
    "quick": Plan(Times(50, 200), 3),
    "smoke": Plan(Times(1, 5), 1),
}


def short(cpu: str) -> Answer:
    """As short as the request."""
    return Answer(REQUEST, REQUEST, cpu)


def run(bench: Bench) -> None:
    """Measure everything that the plan says."""
    plan = PLANS[bench.effort]
    with (
        bench.bed() as bed,
        pairs.pairs(bed) as both,
        served(bench, bed, both, HOPS) as (program, ways),
    ):
        for number, way in pairs.alternated(ways, plan.pairs):
            values = measure(program, way.hop, bench.cpu, short(bench.cpu), plan.times)
            bench.record(way.case, way.variant, number, values)
        for name in HOPS:
            bench.tell(name, "connections_per_s", "whole_p99_us", "connect_us")
        bench.keep_counters(bed, both[1])


@contextmanager
def served(
    bench: Bench, bed: Bed, both: tuple[Pair, Pair], hop_names: Sequence[HopName]
) -> Iterator[tuple[Path, list[Way]]]:
    """The program, and these hops of both pairs with their `churn serve` up."""
    program = ends.compiled(SOURCE, bed.folder)
    ways = [
        Way(name, pair.kind, pingpong.hop(name, pair.client, pair.server))
        for name in hop_names
        for pair in both
    ]
    with ExitStack() as stack:
        for way in ways:
            stack.enter_context(ends.serving(program, way.hop, bench.cpu))
        yield program, ways


def measure(program: Path, hop: Hop, cpu: str, answer: Answer, times: Times) -> dict[str, float]:
    """One run over a hop whose `churn serve` is up: how many connections, at what cost."""
    what = (*astuple(answer), *astuple(times))
    first, *rest = ends.asked(program, "ask", hop, cpu, *what).splitlines()
    count, nanoseconds, cpu_ns = map(int, first.split())
    connects, wholes = zip(*(map(int, line.split()) for line in rest))
    return {
        "connections_per_s": count / nanoseconds * 1e9,
        "cpu_us_per_connection": cpu_ns / count / 1e3,
        "connect_us": statistics.median(connects) / 1e3,
        "whole_us": statistics.median(wholes) / 1e3,
        "whole_p99_us": statistics.quantiles(wholes, n=100, method="inclusive")[98] / 1e3,
    }
