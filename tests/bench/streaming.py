# SPDX-License-Identifier: Apache-2.0
"""One-way and duplex streams by the size of the writes, on one CPU and on two.

Both ends are event loops; a reader takes up to 256 KB at a time. A stream in one direction goes by
TCP, on a fresh connection from its first byte on, on one that has joined after 256 KB. Both
directions at once, it bypasses.
"""

from __future__ import annotations

import statistics
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.bed import ends, pairs, pingpong
from tests.bed.pairs import Pair
from tests.bed.pingpong import Hop, HopName
from tests.bench.bench import Bench, Effort

SOURCE = Path(__file__).with_name("stream.c")
TALK_MS = 200  # of questions and answers, in which a connection joins
Mode = Literal["fresh", "joined", "duplex"]
SIZES = (64, 4096, 65_536, 1_048_576)
EVERYTHING: tuple[tuple[HopName, Mode], ...] = (
    ("inbound", "fresh"),
    ("sidecars", "fresh"),
    ("inbound", "joined"),
    ("inbound", "duplex"),
)


@dataclass(frozen=True)
class Times:
    """Of one run: milliseconds per connection, and how many connections, one after the other.

    Several, since TCP finds its own rhythm on each, and some are several times faster than others.
    """

    warmup: int
    measured: int
    connections: int


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    sizes: tuple[int, ...]
    streams: tuple[tuple[HopName, Mode], ...]
    pinnings: tuple[str, ...]
    times: Times
    pairs: int


PLANS: dict[Effort, Plan] = {
    "full": Plan(SIZES, EVERYTHING, ("same", "two"), Times(40, 80, 2), 5),
    "quick": Plan((64, 4096, 262_144), EVERYTHING[:1], ("same", "two"), Times(40, 60, 2), 3),
    "smoke": Plan((4096,), EVERYTHING[-1:], ("same",), Times(10, 20, 1), 1),
}


@dataclass(frozen=True)
class Stream:
    """Where bytes go, how, and under which name."""

    case: str
    variant: str
    mode: Mode
    program: Path
    hop: Hop
    server: subprocess.Popen[str]


@dataclass(frozen=True)
class End:
    """What one end of a stream saw; stream.c prints it."""

    seconds: float
    received: int
    cpu_s: float

    @staticmethod
    def parse(line: str) -> End:
        nanoseconds, received, cpu_ns = map(int, line.split())
        return End(nanoseconds / 1e9, received, cpu_ns / 1e9)


def run(bench: Bench) -> None:
    """Measure everything that the plan says."""
    plan = PLANS[bench.effort]
    with bench.bed() as bed, pairs.pairs(bed) as both, ExitStack() as stack:
        program = ends.compiled(SOURCE, bed.folder)
        streams = _streams(stack, bench, plan, program, both)
        for pinning, reader in bench.peers(plan.pinnings):
            for size in plan.sizes:
                for number, stream in pairs.alternated(streams, plan.pairs):
                    values = measure(stream, size, plan.times, writer=bench.cpu, reader=reader)
                    case = f"{stream.case}/{pinning}/{size}"
                    bench.record(case, stream.variant, number, values)
                for case in dict.fromkeys(stream.case for stream in streams):
                    bench.tell(f"{case}/{pinning}/{size}", "bytes_per_s", "cpu_ns_per_kb")
        bench.keep_counters(bed, both[1])


def _streams(
    stack: ExitStack, bench: Bench, plan: Plan, program: Path, both: tuple[Pair, Pair]
) -> list[Stream]:
    """Every stream of the plan with its server running, one per hop and variant."""
    listeners: dict[tuple[str, str], tuple[Hop, subprocess.Popen[str]]] = {}

    def stream(name: str, mode: Mode, variant: str, hop: Hop) -> Stream:
        if (name, variant) not in listeners:
            server = stack.enter_context(ends.serving(program, hop, bench.cpu))
            listeners[name, variant] = hop, server
        return Stream(f"{name}/{mode}", variant, mode, program, *listeners[name, variant])

    return [
        stream(name, mode, pair.kind, pingpong.hop(name, pair.client, pair.server))
        for name, mode in plan.streams
        for pair in both
    ]


def measure(
    stream: Stream, size: int, times: Times, *, writer: str, reader: str
) -> dict[str, float]:
    """One run: bytes per second that arrived, over both directions, and CPU time of both ends.

    writer and reader are CPUs.
    """
    how = int(stream.mode == "duplex")  # enum how of stream.c
    talk_ms = 0 if stream.mode == "fresh" else TALK_MS
    what = (size, how, reader, talk_ms, times.warmup, times.measured)
    rates, costs = [], []
    for _ in range(times.connections):
        out = ends.asked(stream.program, "drive", stream.hop, writer, *what)
        assert stream.server.stdout is not None
        driver, server = End.parse(out), End.parse(stream.server.stdout.readline())
        rates.append(driver.received / driver.seconds + server.received / server.seconds)
        kilobytes = (driver.received + server.received) / 1000
        costs.append(1e9 * (driver.cpu_s + server.cpu_s) / kilobytes)
    return {"bytes_per_s": statistics.mean(rates), "cpu_ns_per_kb": statistics.mean(costs)}
