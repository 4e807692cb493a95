# SPDX-License-Identifier: Apache-2.0
"""The main job on this machine, plain and bypassed: run as root by `make demo`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.bed import bpf_objects, cni, cpus, open_bed, pairs, signals, sweep
from tests.bed.addresses import FAMILIES, Family
from tests.bed.bpf_objects import BpfObject
from tests.demo import measure, modes, report
from tests.demo.measure import Measurements, Results
from tests.demo.modes import Mode

OUTPUT = Path(__file__).parents[2] / "build" / "demo"
INTRODUCTION = (
    "Two meshes, each a client's and a server's pod with Envoy sidecars, Istio's iptables rules, "
    "a network by the plugins bridge and host-local, and our plugin in the chain. The pods of one "
    'carry tcpip-bypass/enabled: "false" and stay on TCP/IP; connections of the other bypass it. '
    "They are loaded in turn, never at once; everything measured runs on CPU {cpu}.\n"
)


@dataclass
class Made:
    """What the run puts on this machine, to look for it afterwards."""

    name: str = sweep.run_name(0)
    objects: set[BpfObject] = field(default_factory=set)

    def leftovers(self) -> dict[str, list[str]]:
        """What of it is still there, by kind."""
        surviving = bpf_objects.surviving(self.objects)
        return {
            "BPF programs": [str(found) for found in surviving if found.kind == "program"],
            "BPF maps": [str(found) for found in surviving if found.kind == "map"],
            **sweep.leftovers(self.name),
        }


def run(console: Console, made: Made, family: Family, runs: int, asked: Mode | None) -> Results:
    """Set everything up, measure in each mode, and take it down again."""
    cpu = cpus.chosen().measured
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("setting up", total=None)

        def tell(line: str) -> None:
            progress.console.print(line, highlight=False)
            progress.update(task, advance=1, description="measuring")

        subnets = cni.IPV4 if family == "v4" else cni.DUAL_STACK
        with open_bed(subnets=subnets) as bed:
            made.objects = bpf_objects.pinned(bed.node.bpffs)
            console.print(INTRODUCTION.format(cpu=cpu), highlight=False)
            status = bed.node.status()
            verdict = status["mode"]
            measured = [Measurements(mode, runs) for mode in modes.chosen(asked, verdict)]
            progress.update(task, total=sum(found.steps for found in measured))
            for found in measured:
                console.print(f"In {modes.title(found.mode, verdict)}:", highlight=False)
                network = bed.network(found.mode, bed.chain.plugins[0], mode=found.mode)
                with pairs.pairs(network) as both:
                    measure.measure_hops(network, both, cpu, found, tell, family=family)
                    measure.measure_mesh(network, both, cpu, found, tell, family=family)
            progress.update(task, description="taking down")
    return Results(verdict, status["reason"], measured)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `mode` is None unless one is asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=__doc__)
    parser.add_argument(
        "--mode",
        choices=modes.MODES,
        help="only this one (default: auto and, if that gives less, full as well)",
    )
    parser.add_argument(
        "--family",
        choices=FAMILIES,
        default="v4",
        help="what the application speaks; mapped: IPv4 on an IPv6 socket (default: v4)",
    )
    parser.add_argument(
        "--runs",
        type=int,
        choices=range(1, 100),
        metavar="N",
        default=measure.RUNS,
        help="each figure is the median of so many (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main() -> int:
    """Returns the exit status: 0, 1 when something was left behind, 130 after Ctrl-C."""
    asked = arguments()
    family: Family = asked.family
    output = OUTPUT if family == "v4" else OUTPUT / family
    console = Console()
    if os.geteuid() != 0:
        console.print("The demo makes network namespaces and loads BPF programs: run it as root.")
        return 1
    signals.stop_at_first()
    made = Made()
    results = None
    try:
        results = run(console, made, family, asked.runs, asked.mode)
        report.show(console, results)
    except KeyboardInterrupt as interrupt:
        console.print(f"{interrupt}: stopped before everything was measured.")
    finally:
        left = made.leftovers()
        report.show_leftovers(console, left)
    if results is None:
        return 130
    if results.modes:
        output.mkdir(parents=True, exist_ok=True)
        report.draw(results, output / "latency.png")
        report.write_json(results, left, output / "demo.json")
        console.print(f"Latency distributions: {output}/latency.png; every run: {output}/demo.json")
    return 1 if any(left.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
