# SPDX-License-Identifier: Apache-2.0
"""One large answer on each fresh connection, by its size and that of its writes.

One exchange is too few to join, so the answer goes by TCP: what it pays for the programs is
measured. The reader takes up to 256 KB at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from tests.bed import pairs
from tests.bed.pingpong import HopName
from tests.bench import churn
from tests.bench.bench import Bench, Effort
from tests.bench.churn import Answer, Times

WHOLE = 1_048_576  # the largest write of churn.c


@dataclass(frozen=True)
class Plan:
    """How much to measure; a write is never larger than the answer."""

    pinnings: tuple[str, ...]
    sizes: tuple[int, ...]
    writes: tuple[int, ...]
    times: Times
    pairs: int


BOTH = ("same", "two")
HOPS: tuple[HopName, ...] = ("inbound", "sidecars")  # within a pod, and between two
SIZES = (65_536, 1_048_576, 4_194_304)
PLANS: dict[Effort, Plan] = {
    "full": Plan(BOTH, SIZES, (16_384, WHOLE), Times(30, 120), 7),
    "quick": Plan(BOTH, SIZES[1:2], (16_384, WHOLE), Times(20, 60), 3),
    "smoke": Plan(BOTH[:1], SIZES[:1], (16_384,), Times(1, 5), 1),
}


def run(bench: Bench) -> None:
    """Measure everything that the plan says."""
    plan = PLANS[bench.effort]
    with (
        bench.bed() as bed,
        pairs.pairs(bed) as both,
        churn.served(bench, bed, both, HOPS) as (program, ways),
    ):
        peers = bench.peers(plan.pinnings)
        for (pinning, cpu), size, write in product(peers, plan.sizes, plan.writes):
            if write > size:
                continue
            answer, case = Answer(size, write, cpu), f"{pinning}/{size}/{write}"
            for number, way in pairs.alternated(ways, plan.pairs):
                values = churn.measure(program, way.hop, bench.cpu, answer, plan.times)
                bench.record(f"{way.case}/{case}", way.variant, number, values)
            for name in HOPS:
                bench.tell(f"{name}/{case}", "whole_us", "whole_p99_us")
        bench.keep_counters(bed, both[1])
