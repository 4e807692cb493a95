# SPDX-License-Identifier: Apache-2.0
"""Every application over TCP and bypassed, in turn: run as root by `make apps`."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from tests.apps import bed, report
from tests.apps.application import Application, Figures
from tests.apps.bed import AppNode
from tests.apps.place import HOPS, HopName
from tests.apps.registry import APPLICATIONS
from tests.bed import congestion, cpus, pairs
from tests.bed.bed import REPOSITORY
from tests.bed.cpus import Cpus
from tests.bed.pairs import KINDS, Cost, Kind
from tests.bench import entry
from tests.bench.bench import Bench
from tests.bench.results import Results, Section, load

OUTPUT = REPOSITORY / "build" / "apps"
DOCUMENT = REPOSITORY / "docs" / "applications.md"
TABLES = OUTPUT / "tables.md"
README = REPOSITORY / "README.md"
PICTURE = REPOSITORY / "docs" / "img" / "applications.png"
WARM_UP_S = 0.5
# A check may take this much longer than over TCP: else something stalls, and goes on.
LATER, LATER_S = 3, 3.0
TOLD = ("requests_per_s", "p50_us", "p99_us", "cpu_us_per_request")


@dataclass(frozen=True)
class Plan:
    """How much to measure of each load."""

    pairs: int
    seconds: float
    hops: tuple[HopName, ...]


FULL = Plan(5, 1.5, HOPS)
QUICK = Plan(3, 1.0, ("outbound", "mesh"))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `apps` holds names of APPLICATIONS."""
    parser = argparse.ArgumentParser(prog="python -m tests.apps", description=__doc__)
    parser.add_argument(
        "apps",
        nargs="?",
        default="",
        metavar="APPLICATION,...",
        help=f"of {', '.join(APPLICATIONS)}; the others' results stay as they are",
    )
    parser.add_argument(
        "--mode", choices=("full", "auto"), default="full", help="as in the plugin's configuration"
    )
    parser.add_argument("--quick", action="store_true", help="two hops, fewer and shorter runs")
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER")
    entry.add_report(parser, OUTPUT / "full.json", DOCUMENT)
    chosen = parser.parse_args(argv)
    chosen.apps = [name for name in chosen.apps.split(",") if name] or list(APPLICATIONS)
    entry.refuse_unknown(parser, "application", chosen.apps, APPLICATIONS)
    return chosen


def values(figures: Figures, cost: Cost) -> dict[str, float]:
    """A run's values. Every CPU second of both pods counts, the client's as well."""
    found = {
        "requests_per_s": figures.requests / figures.seconds,
        "bytes_per_s": figures.bytes / figures.seconds or None,
        "p50_us": figures.p50_us,
        "p99_us": figures.p99_us,
        "cpu_us_per_request": cost.cpu_s / figures.requests * 1e6,
    }
    return {name: value for name, value in found.items() if value is not None}


def is_late(taken_s: Mapping[Kind, float]) -> bool:
    """Whether the check over the bypass took much longer than over TCP."""
    return taken_s["bypass"] > LATER * taken_s["plain"] + LATER_S


def refuse_stalls(taken_s: Mapping[Kind, float]) -> None:
    """Raises AssertionError when it did."""
    assert not is_late(taken_s), (
        f"the check took {taken_s['bypass']:.1f} s, over TCP {taken_s['plain']:.1f} s"
    )


def measure_hop(
    bench: Bench, node: AppNode, application: Application, hop: HopName, plan: Plan
) -> None:
    """Check the application on both kinds of pods, then load them in turn."""
    with ExitStack() as stack:
        places = {
            kind: stack.enter_context(bed.served(node, application, hop, kind, bench.cpu))
            for kind in KINDS
        }
        taken_s = {
            kind: bed.check(node, application, where, must_bypass=False)
            for kind, where in places.items()
        }
        refuse_stalls(taken_s)
        for title, run in application.loads.items():
            case = f"{hop}/{title}"
            for where in places.values():
                run(where, WARM_UP_S)
            for number, kind in pairs.alternated(KINDS, plan.pairs):
                where = places[kind]
                before = bed.total(node, where.pair)
                run_it = partial(run, where, plan.seconds)
                figures, cost = pairs.measured(where.pair, bench.cpu, run_it)
                found = values(figures, cost)
                if kind == "bypass":
                    now = bed.total(node, where.pair)
                    found["bypassed_bytes"] = now.bypassed - before.bypassed
                    found["tcp_bytes"] = now.by_tcp - before.by_tcp
                bench.record(case, kind, number, found)
            bench.tell(case, *TOLD)


def measure(
    node: AppNode,
    application: Application,
    plan: Plan,
    measuring: Cpus,
    console: Console,
    *,
    faults: Sequence[str] = (),
) -> Section:
    """Measure an application; one that fails says so and keeps what it has."""
    with entry.begun(application.name, measuring, console) as section:
        section.machine["failures"] = failures = {}
        section.machine["faults"] = faults
        if faults:  # `auto` gives less here
            return section
        for hop in application.hops:
            if hop not in plan.hops:
                continue
            try:
                bench = Bench("full", measuring, section, console)
                measure_hop(bench, node, application, hop, plan)
            except KeyboardInterrupt as interrupt:
                section.machine["interrupted"] = str(interrupt)
                break
            except Exception as error:
                console.print(traceback.format_exc())
                lines = str(error).strip().splitlines() or [""]
                failures[hop] = f"{type(error).__name__}: {lines[-1]}"
    return section


def run(chosen: argparse.Namespace, console: Console) -> int:
    """Measure the chosen applications, each saved as it is done; returns the exit status."""
    path: Path = chosen.output / f"{chosen.mode}.json"
    results = load(path) if path.exists() else Results()
    measuring = cpus.chosen()
    usual = congestion.USUAL
    with congestion.allowed(usual), bed.opened({chosen.mode: KINDS}, usual) as nodes:
        for name in chosen.apps:
            plan = QUICK if chosen.quick else FULL
            application, node = APPLICATIONS[name], nodes[chosen.mode]
            faults = sorted(bed.faults(node, application)) if chosen.mode == "full" else ()
            section = measure(node, application, plan, measuring, console, faults=faults)
            results.sections[name] = section
            results.save(path)
            if "interrupted" in section.machine:
                break
    report.draw(results, chosen.output / "applications.png")
    report.show(results, console)
    console.print(f"Every number: {path}; a picture beside it. The page: --report {path}")
    failed = [name for name in chosen.apps if report.is_incomplete(results, name)]
    return 1 if failed else 0


class Logged(Console):
    """A console that prints everything to a file as well."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(soft_wrap=True, highlight=False)
        self._log = Console(file=file, soft_wrap=True, highlight=False)

    def print(self, *objects: Any, **options: Any) -> None:
        """As Console.print()."""
        super().print(*objects, **options)
        self._log.print(*objects, **options)


def logged(chosen: argparse.Namespace) -> int:
    """The run, with its log beside its results; returns the exit status."""
    path: Path = chosen.output / f"{chosen.mode}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", buffering=1) as file:
        console = Logged(file)
        console.print(f"The log of this run: {path}")
        return run(chosen, console)


def main() -> int:
    """Returns the exit status: 1 when an application failed or could not be measured."""
    chosen = arguments()
    console = Console(soft_wrap=True, highlight=False)
    if chosen.report is not None:
        results = load(chosen.report)
        report.draw(results, PICTURE)
        report.write(results, DOCUMENT, PICTURE)
        report.write_readme(README, DOCUMENT)
        report.write_tables(results, TABLES)
        console.print(f"{DOCUMENT} from {chosen.report}")
        return 0
    return entry.as_root(partial(logged, chosen), console)


if __name__ == "__main__":
    sys.exit(main())
