# SPDX-License-Identifier: Apache-2.0
"""What the commands that measure have in common: tests.bench and tests.apps."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from tests.bed import signals
from tests.bed.bed import REPOSITORY
from tests.bed.cpus import Cpus
from tests.bench import machine
from tests.bench.results import Section


def add_report(parser: argparse.ArgumentParser, results: Path, document: Path) -> None:
    """The option --report: render `document` from results, by default from these."""
    parser.add_argument(
        "--report",
        nargs="?",
        type=Path,
        const=results,
        metavar="RESULTS",
        help=f"measure nothing, write {document.relative_to(REPOSITORY)} from results",
    )


def refuse_unknown(
    parser: argparse.ArgumentParser, kind: str, named: Collection[str], known: Collection[str]
) -> None:
    """Ends the command with its usage when a name is none of the known ones."""
    unknown = set(named) - set(known)
    if unknown:
        parser.error(f"no {kind} {', '.join(sorted(unknown))}; there are {', '.join(known)}")


@contextmanager
def begun(name: str, measuring: Cpus, console: Console) -> Iterator[Section]:
    """A section with the machine's facts, how long it took, and what was stolen meanwhile."""
    section = Section(machine.facts(measuring))
    console.print(f"[bold]{name}[/bold]")
    stolen, start = machine.stolen_share(measuring), time.monotonic()
    yield section
    section.machine["took_s"] = round(time.monotonic() - start)
    section.machine["stolen_share"] = stolen()


def as_root(measure: Callable[[], int], console: Console) -> int:
    """Measures until the first signal to stop; returns the exit status."""
    if os.geteuid() != 0:
        console.print("This makes network namespaces and loads BPF programs: run it as root.")
        return 1
    signals.stop_at_first()
    return measure()
