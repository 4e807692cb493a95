# SPDX-License-Identifier: Apache-2.0
"""The table of kernels, and whether each is what its self-test took it for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cni_plugin import names
from tests.kernels.machine import Run
from tests.kernels.suites import Failed, Suite

_STDERR_LINES = 30


@dataclass(frozen=True)
class Verdict:
    """One kernel's line. `problems` is empty if all is well."""

    summaries: dict[str, str]  # by suite
    problems: list[str]


def judge(run: Run, suites: Sequence[Suite]) -> Verdict:
    """Holds what the suites found on one kernel against each other."""
    summaries, problems = {}, []
    agreeing = frozenset(names.MODES)
    outcomes = {outcome.suite: outcome for outcome in run.outcomes}
    for suite in suites:
        outcome = outcomes.get(suite.name)
        try:
            if outcome is None:
                raise Failed("ran out of time" if run.timed_out else "the kernel went down")
            finding = outcome.finding()
        except Failed as failure:
            summaries[suite.name] = "FAILED"
            stderr = outcome.stderr.splitlines() if outcome else []
            problems += [f"{suite.name}: {failure}", *stderr[-_STDERR_LINES:]]
            continue
        summaries[suite.name] = finding.summary
        agreeing &= finding.agreeing_modes
        problems += [f"{suite.name}: {problem}" for problem in finding.problems]
    if not agreeing:
        problems.append("the self-test's mode and what the other suites found do not agree")
    problems += run.complaints
    return Verdict(summaries, problems)


def show(runs: Sequence[Run]) -> int:
    """Prints the table and every problem below it. Returns the number of kernels with problems."""
    console = Console(width=None if Console().is_terminal else 160)
    suites = dict.fromkeys(suite.name for run in runs for suite in run.suites)
    table = Table("kernel", "boot", *suites, "agree", show_lines=True)
    verdicts = [judge(run, run.suites) for run in runs]
    for run, verdict in zip(runs, verdicts, strict=True):
        table.add_row(
            run.kernel.title,
            "-" if run.boot_s is None else f"{run.boot_s:.0f} s",
            *(escape(verdict.summaries.get(suite, "-")) for suite in suites),
            "NO" if verdict.problems else "yes",
        )
    console.print(table)
    for run, verdict in zip(runs, verdicts, strict=True):
        if verdict.problems:
            console.print(f"{run.kernel.title}:", *verdict.problems, sep="\n  ", markup=False)
    return sum(bool(verdict.problems) for verdict in verdicts)
