"""The main job on this machine, plain and bypassed: run as root by `make demo`."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.bed import bpf_objects, open_bed, sweep
from tests.bed.bpf_objects import BpfObject
from tests.demo import measure, report
from tests.demo.measure import Measurements

OUTPUT = Path(__file__).parents[2] / "build" / "demo"
INTRODUCTION = (
    "Two meshes, each a client's and a server's pod with Envoy sidecars, Istio's iptables rules, "
    "a network by the plugins bridge and host-local, and our plugin in the chain. The pods of one "
    'carry tcpip-bypass/enabled: "false" and stay on TCP/IP; connections of the other bypass it. '
    "They are loaded in turn, never at once; everything measured runs on CPU {cpu}.\n"
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_once(number: int, _frame: FrameType | None) -> NoReturn:
    """Unwind at the first signal; a second one must not break into the cleaning up."""
    for each in SIGNALS:
        signal.signal(each, lambda _number, _frame: None)  # SIG_IGN races with a pending one
    raise KeyboardInterrupt(signal.Signals(number).name)


def choose_cpus() -> str:
    """The one CPU for everything measured; this program moves to the others, if there are any."""
    *others, chosen = sorted(os.sched_getaffinity(0))
    if others:
        os.sched_setaffinity(0, others)
    return str(chosen)


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


def run(console: Console, made: Made) -> Measurements:
    """Set everything up, measure, and take it down again."""
    cpu = choose_cpus()
    found = Measurements()
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("setting up", total=measure.STEPS)

        def tell(line: str) -> None:
            progress.console.print(line, highlight=False)
            progress.update(task, advance=1, description="measuring")

        with open_bed(bypass=True) as bed:
            made.objects = bpf_objects.pinned(bed.node.bpffs)
            with measure.pairs(bed) as both:
                console.print(INTRODUCTION.format(cpu=cpu), highlight=False)
                measure.measure_hops(bed, both, cpu, found, tell)
                measure.measure_mesh(bed, both, cpu, found, tell)
            progress.update(task, description="taking down")
    return found


def main() -> int:
    """Returns the exit status: 0, 1 when something was left behind, 130 after Ctrl-C."""
    console = Console()
    if os.geteuid() != 0:
        console.print("The demo makes network namespaces and loads BPF programs: run it as root.")
        return 1
    for each in SIGNALS:
        signal.signal(each, stop_once)
    made = Made()
    found = None
    try:
        found = run(console, made)
        report.show(console, found)
    except KeyboardInterrupt as interrupt:
        console.print(f"{interrupt}: stopped before everything was measured.")
    finally:
        left = made.leftovers()
        report.show_leftovers(console, left)
    if found is None:
        return 130
    OUTPUT.mkdir(parents=True, exist_ok=True)
    report.draw(found, OUTPUT / "latency.png")
    report.write_json(found, left, OUTPUT / "demo.json")
    console.print(f"Latency distributions: {OUTPUT}/latency.png; every run: {OUTPUT}/demo.json")
    return 1 if any(left.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
