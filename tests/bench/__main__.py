# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.bench`: measure, or render what was measured. Measuring needs root."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from tests.bed import cpus
from tests.bed.bed import REPOSITORY
from tests.bed.cpus import Cpus
from tests.bench import (
    answers,
    churn,
    entry,
    figures,
    hops,
    limits,
    machine,
    meshes,
    others,
    plots,
    report,
    scale,
    streaming,
)
from tests.bench.bench import Bench, Effort
from tests.bench.results import Results, Section, load

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "hops": hops.run,
    "streaming": streaming.run,
    "mesh": meshes.run,
    "churn": churn.run,
    "answers": answers.run,
    "others": others.run,
    "scale": scale.run,
}
OUTPUT = REPOSITORY / "build" / "bench"
DOCUMENT = REPOSITORY / "docs" / "benchmarks.md"
PICTURES = REPOSITORY / "docs" / "img"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `only` holds names of SECTIONS."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument(
        "--only",
        type=lambda names: names.split(","),
        metavar="SECTION,...",
        help=f"of {', '.join(SECTIONS)}; the others' results stay as they are",
    )
    parser.add_argument("--quick", action="store_true", help="few cases, few runs: two minutes")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help=f"default: {OUTPUT}")
    entry.add_report(parser, OUTPUT / "results.json", DOCUMENT)
    chosen = parser.parse_args(argv)
    entry.refuse_unknown(parser, "section", chosen.only or (), SECTIONS)
    return chosen


def run_section(name: str, effort: Effort, measuring: Cpus, console: Console) -> Section:
    """Measure a section; one that fails or is interrupted says so and keeps what it has."""
    with entry.begun(name, measuring, console) as section:
        warning = machine.disturbance(section.machine)
        if warning is not None:
            console.print(f"  [bold]Warning: {warning}.[/bold]")
        try:
            SECTIONS[name](Bench(effort, measuring, section, console))
        except KeyboardInterrupt as interrupt:
            section.machine["incomplete"] = f"interrupted ({interrupt})"
        except Exception as error:
            console.print(traceback.format_exc())
            section.machine["incomplete"] = f"{type(error).__name__}: {error}".splitlines()[0]
    return section


def measure(chosen: argparse.Namespace, console: Console) -> int:
    """Measure the chosen sections, each saved as it is done; returns the exit status."""
    effort: Effort = "quick" if chosen.quick else "full"
    folder: Path = chosen.output or (OUTPUT / "quick" if chosen.quick else OUTPUT)
    path = folder / "results.json"
    results = load(path) if chosen.only and path.exists() else Results()
    measuring = cpus.chosen()
    for name in chosen.only or SECTIONS:
        section = run_section(name, effort, measuring, console)
        results.sections[name] = section
        results.save(path)
        if section.machine.get("incomplete", "").startswith("interrupted"):
            break
    plots.draw(results, folder)
    show(console, results)
    console.print(f"Every number: {path}; pictures beside it. The report: --report {path}")
    return 1 if any("incomplete" in each.machine for each in results.sections.values()) else 0


def show(console: Console, results: Results) -> None:
    """Print what was promised and what came out, a line each."""
    for verdict in limits.verdicts(results):
        if verdict.kept is not None:
            limit = verdict.limit
            found = f"{limit.metric} {verdict.ratio} in {verdict.case}"
            kept = "kept  " if verdict.kept else "BROKEN"
            console.print(f"{kept} {limit.claim}: {found}, promised {limit.bound}")


def render(results: Results, every_table: Path, console: Console) -> None:
    """Write the page, the pictures and all tables; and the figures of `estimate`."""
    report.write(results, DOCUMENT, PICTURES, every_table)
    console.print(f"{DOCUMENT}, {PICTURES}/bench-*.png and {every_table}")
    if "hops" in results.sections:
        figures.write(results.sections["hops"])
        console.print(f"{figures.MODULE}")


def main() -> int:
    """Returns the exit status: 1 when a section could not be measured."""
    chosen = arguments()
    console = Console(soft_wrap=True, highlight=False)
    if chosen.report is not None:
        render(load(chosen.report), chosen.report.with_name("tables.md"), console)
        return 0
    return entry.as_root(partial(measure, chosen, console), console)


if __name__ == "__main__":
    sys.exit(main())
