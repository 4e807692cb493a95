# SPDX-License-Identifier: Apache-2.0
"""What the bypass costs those who gain nothing from it.

"out" and "in": an accelerated pod (its sidecar, which the iptables rules leave alone) and somebody
who is not: a pod of another network without sidecar, reached over two veths and the node's routing,
as a machine beyond it would be. To the programs the two are the same: nobody of ours listens.
"stranger": two pods without sidecar, on a node with our programs and an accelerated pod against the
same node with nothing of ours in the kernel.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bed import Bed, Pod, cni, ends, istio, pairs, pingpong
from tests.bed.pairs import KINDS, Kind, Pair
from tests.bed.pingpong import APP_PORT, Hop
from tests.bed.pod import APP, PROXY
from tests.bench import churn, streaming
from tests.bench.bench import Bench, Effort
from tests.bench.hops import Way
from tests.bench.streaming import Stream

OUTSIDE_SUBNETS = ("10.245.0.0/16",)
ANY = "0.0.0.0"
WRITE_SIZE = 65_536
TOLD = ("median_us", "bytes_per_s", "connect_us")


@dataclass(frozen=True)
class Plan:
    """How much to measure; `stranger_pairs` each load and unload the programs, and measure the
    strangers `stranger_runs` times with and without them."""

    rounds: int
    stream: streaming.Times
    churn: churn.Times
    pairs: int
    stranger_pairs: int
    stranger_runs: int


PLANS: dict[Effort, Plan] = {
    "full": Plan(15_000, streaming.Times(40, 100, 4), churn.Times(100, 300), 9, 5, 3),
    "quick": Plan(5_000, streaming.Times(20, 50, 4), churn.Times(33, 100), 3, 2, 1),
    "smoke": Plan(50, streaming.Times(5, 10, 1), churn.Times(1, 5), 1, 1, 2),
}


def run(bench: Bench) -> None:
    """Measure everything that the plan says."""
    plan = PLANS[bench.effort]
    with bench.bed() as bed:
        programs = {
            source.stem: ends.compiled(source, bed.folder)
            for source in (pingpong.SOURCE, streaming.SOURCE, churn.SOURCE)
        }
        _off_host(bench, plan, bed, programs)
        _strangers(bench, plan, bed, programs)


def _off_host(bench: Bench, plan: Plan, bed: Bed, programs: dict[str, Path]) -> None:
    network = bed.network("outside", cni.ptp(bed.ipam, OUTSIDE_SUBNETS))
    with pairs.pairs(bed) as both, network.pod("outside", interception=None) as outside:
        ways = [way for pair in both for way in _ways(pair, outside)]
        for number, way in pairs.alternated(ways, plan.pairs):
            values = _measure(programs, way.hop, bench.cpu, plan)
            bench.record(way.case, way.variant, number, values)
    for case in ("out", "in"):
        bench.tell(case, *TOLD)


def _ways(pair: Pair, outside: Pod) -> list[Way]:
    return [
        Way(
            *("out", pair.kind),
            Hop(*(pair.client, PROXY, ANY, outside.ip, APP_PORT), *(outside, APP, ANY, APP_PORT)),
        ),
        Way(
            *("in", pair.kind),
            Hop(
                *(outside, APP, ANY, pair.server.ip, APP_PORT),
                *(pair.server, PROXY, ANY, istio.INBOUND_PORT),
            ),
        ),
    ]


def _strangers(bench: Bench, plan: Plan, bed: Bed, programs: dict[str, Path]) -> None:
    with (
        bed.pod("stranger-1", interception=None) as one,
        bed.pod("stranger-2", interception=None) as other,
    ):
        hop = pingpong.hop("direct", one, other)
        bed.node.call("unload")
        for number, kind in pairs.alternated(KINDS, plan.stranger_pairs):
            with _node(bed, kind, number):
                runs = [_measure(programs, hop, bench.cpu, plan) for _ in range(plan.stranger_runs)]
            medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            bench.record("stranger", kind, number, medians)
    bench.tell("stranger", *TOLD)


@contextmanager
def _node(bed: Bed, kind: Kind, number: int) -> Iterator[None]:
    """The node with our programs and an accelerated pod, or with neither.

    It has had them a moment ago in any case: what it takes to load them would be seen otherwise.
    """
    with ExitStack() as stack:
        stack.enter_context(bed.node.loaded())
        stack.enter_context(bed.pod(f"neighbour-{kind}-{number}"))
        if kind == "plain":
            stack.close()
        yield


def _measure(programs: dict[str, Path], hop: Hop, cpu: str, plan: Plan) -> dict[str, float]:
    """Round trips, streams and connections over a hop; nobody may be listening there yet."""
    with pingpong.serving(programs["pingpong"], hop, cpu):
        trips = pingpong.measure(programs["pingpong"], hop, cpu, rounds=plan.rounds)
    values = {"median_us": trips.median_us, "p99_us": trips.p99_us}
    with ends.serving(programs["stream"], hop, cpu) as server:
        stream = Stream("", "", "fresh", programs["stream"], hop, server)
        values |= streaming.measure(stream, WRITE_SIZE, plan.stream, writer=cpu, reader=cpu)
    with ends.serving(programs["churn"], hop, cpu):
        short = churn.measure(programs["churn"], hop, cpu, churn.short(cpu), plan.churn)
    return {**values, **short}
