# SPDX-License-Identifier: Apache-2.0
"""Round trips in every family and on every path, plain and bypassed: `python -m tests.demo.reach`.

As the demo measures a request's hops: 64 bytes there and back, a small C program at both ends, both
on one CPU, the two kinds in turn. Run as root on an idle machine.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from cni_plugin import names
from tests.bed import OPTED_OUT, Bed, cpus, ends, kubeproxy, open_bed, pairs, pingpong
from tests.bed.addresses import FAMILIES, Family
from tests.bed.cni import DUAL_STACK
from tests.bed.istio import Interception
from tests.bed.pairs import KINDS, Kind, Pair
from tests.bed.pingpong import HopName

OUTPUT = Path(__file__).parents[2] / "build" / "demo" / "reach.json"
RUNS = 5
ROUNDS = 10_000
SIZE = 64

Pods = Literal["mesh", "tproxy", "plain"]
INTERCEPTIONS: dict[Pods, Interception | None] = {
    "mesh": Interception(),
    "tproxy": Interception("TPROXY"),
    "plain": None,
}
FAMILY_NAMES: dict[Family, str] = {"v4": "IPv4", "v6": "IPv6", "mapped": "mapped"}


@dataclass(frozen=True)
class Way:
    """A line of the table."""

    title: str
    pods: Pods
    hop: HopName
    family: Family


PATHS: tuple[tuple[str, Pods, HopName], ...] = (
    ("app -> Envoy", "mesh", "outbound"),
    ("Envoy -> Envoy", "mesh", "sidecars"),
    ("Envoy -> app", "mesh", "inbound"),
    ("Envoy -> Envoy, TPROXY", "tproxy", "sidecars"),
    ("app -> app", "plain", "direct"),
    ("app -> ClusterIP", "plain", "service"),
    ("within a plain pod", "plain", "local"),
)
WAYS = [Way(*path, family) for path in PATHS for family in FAMILIES]


@dataclass(frozen=True)
class Line:
    """What came of a way; the medians of its runs, in microseconds."""

    way: Way
    median_us: dict[Kind, float]
    p99_us: dict[Kind, float]
    bypassed: float  # the part of the bytes sent between the accelerated pods, 0 to 1

    @property
    def ratio(self) -> float:
        return self.median_us["bypass"] / self.median_us["plain"]


def paired(bed: Bed, stack: ExitStack, pods: Pods, kind: Kind) -> Pair:
    """A client's and a server's pod, accelerated or not."""
    annotations = OPTED_OUT if kind == "plain" else {names.ENABLED: "true"}
    client, server = (
        stack.enter_context(
            bed.pod(
                f"{pods}-{kind}-{role}", interception=INTERCEPTIONS[pods], annotations=annotations
            )
        )
        for role in ("client", "server")
    )
    return Pair(kind, client, server)


def measured(console: Console) -> Iterator[Line]:
    """Each line of the table as it is done."""
    cpu = cpus.chosen().measured
    with open_bed(subnets=DUAL_STACK) as bed, ExitStack() as stack:
        program = ends.compiled(pingpong.SOURCE, bed.folder)
        made = {pods: [paired(bed, stack, pods, kind) for kind in KINDS] for pods in INTERCEPTIONS}
        for way in WAYS:
            console.print(f"{way.title}, {FAMILY_NAMES[way.family]}", highlight=False)
            yield line(bed, made[way.pods], way, program, cpu)


def line(bed: Bed, both: list[Pair], way: Way, program: Path, cpu: str) -> Line:
    """The runs of one way, the two pairs in turn."""
    trips: dict[Kind, list[pingpong.RoundTrips]] = {kind: [] for kind in KINDS}
    before = bypassed_bytes(bed, both[1])
    for _, pair in pairs.alternated(both, RUNS):
        hop = pingpong.hop(way.hop, pair.client, pair.server, way.family)
        with contextlib.ExitStack() as stack:
            if way.hop == "service":
                stack.enter_context(kubeproxy.service(bed.host, pair.server, way.family))
            stack.enter_context(pingpong.serving(program, hop, cpu, SIZE))
            trips[pair.kind].append(pingpong.measure(program, hop, cpu, size=SIZE, rounds=ROUNDS))
    rounds = sum(run.warmup + ROUNDS for run in trips["bypass"])
    return Line(
        way,
        {kind: statistics.median(run.median_us for run in trips[kind]) for kind in KINDS},
        {kind: statistics.median(run.p99_us for run in trips[kind]) for kind in KINDS},
        (bypassed_bytes(bed, both[1]) - before) / (rounds * 2 * SIZE),
    )


def bypassed_bytes(bed: Bed, pair: Pair) -> int:
    """So far, whatever the hop was taken for."""
    wanted = {pair.client.name, pair.server.name}
    return sum(
        counters["bypassed_bytes"]
        for pod in bed.node.status()["pods"]
        if pod["name"] in wanted
        for counters in pod["hops"].values()
    )


def table(lines: list[Line]) -> Table:
    """For a person at 80 columns."""
    made = Table(box=box.SIMPLE, show_edge=False, padding=(0, 0, 0, 1))
    columns = (
        *("path", "family", "TCP/IP\nmedian", "bypass\nmedian", "ratio", "TCP/IP\np99"),
        *("bypass\np99", "bytes\nbypassed"),
    )
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for each in lines:
        made.add_row(
            each.way.title,
            FAMILY_NAMES[each.way.family],
            *(f"{each.median_us[kind]:.1f}" for kind in KINDS),
            f"{each.ratio:.2f}",
            *(f"{each.p99_us[kind]:.1f}" for kind in KINDS),
            f"{each.bypassed:.1%}",
        )
    return made


def main() -> int:
    console = Console()
    lines = list(measured(console))
    console.print(
        "\nRound trip of 64 bytes, in microseconds; mode full, forced\n",
        table(lines),
        highlight=False,
    )
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(
        json.dumps([{**asdict(each), "ratio": each.ratio} for each in lines], indent=1)
    )
    console.print(f"Every line: {OUTPUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
