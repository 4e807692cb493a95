"""The Markdown report: what was promised, where it is not faster, and every table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.bench import limits, machine, plots
from tests.bench.limits import Verdict
from tests.bench.metrics import METRICS
from tests.bench.results import Results, Section
from tests.bench.tables import CHAPTERS, NOT_MEASURED, Chapter, Table

HEAD = """\
# Benchmarks

Written by `python -m tests.bench --report`; do not edit. To run it again, as root:
`make bench` (an hour; `make bench BENCH=--quick`: two minutes).

Everything is measured over TCP/IP and bypassed in turn, within seconds of each other, every other
pair in reverse order, on pinned CPUs, after a warm-up. The plain pods stand on the same node and
differ by the annotation `tcpip-bypass/enabled: "false"` alone. Figures are medians over the runs
with ± half of the interquartile range, TCP → bypass. A ratio is the median of the pairs' ratios,
bypass to TCP; in brackets its 95 % interval: the percentile bootstrap over the pairs (4,000 times
as many pairs as there are, drawn with replacement). With five pairs that is nearly their whole
range.
"""


def write(results: Results, document: Path, pictures: Path) -> None:
    """Render the report, and its pictures into a folder of their own."""
    drawn = plots.draw(results, pictures)
    lines = [HEAD, *_machine(results), *_promised(results), *_not_faster(results)]
    for name, chapter in CHAPTERS.items():
        if name in results.sections:
            shown = [
                os.path.relpath(drawn[picture], document.parent)
                for picture in chapter.pictures
                if picture in drawn
            ]
            lines += _chapter(chapter, results.sections[name], shown)
    document.write_text("\n".join(lines).rstrip() + "\n")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(titles: list[str]) -> list[str]:
    return [_row(titles), _row(["---"] * len(titles))]


def _machine(results: Results) -> Iterator[str]:
    """One line per distinct machine, and a warning where it was busy."""
    yield "## The machine\n"
    titles = ["section", "date", "kernel", "CPU", "memory", "congestion control"]
    yield from _header([*titles, "busy before", "stolen"])
    for name, section in results.sections.items():
        found = section.machine
        busy = ", ".join(f"CPU {cpu}: {share:.0%}" for cpu, share in found["busy_before"].items())
        cpu = f"{found['cpus']} x {found['cpu']}, measuring on {found['measuring_cpu']}"
        stolen = f"{found.get('stolen_share', 0):.1%}"
        memory, control = f"{found['memory_gib']} GiB", found["congestion_control"]
        yield _row([name, found["date"], found["kernel"], cpu, memory, control, busy, stolen])
    yield ""
    for name, section in results.sections.items():
        if (warning := machine.disturbance(section.machine)) is not None:
            yield f"**Section {name}: {warning}.**\n"
        if "incomplete" in section.machine:
            yield f"**Section {name} is incomplete: {section.machine['incomplete']}.**\n"
    yield from _counted(results)
    yield _versions(next(iter(results.sections.values())).machine) if results.sections else ""
    yield ""


def _counted(results: Results) -> Iterator[str]:
    """That the bypassed runs were bypassed."""
    yield "What the data path counted for the accelerated pods: the part of the bytes that bypassed"
    yield "TCP by hop, and the ends of connections (in *others* nothing is meant to bypass):\n"
    for name, section in results.sections.items():
        shares = [
            f"{hop} {found.share:.1%}" for hop, found in section.payload.items() if found.bypassed
        ]
        ends = [f"{count:,} {outcome}" for outcome, count in section.outcomes.items() if count]
        if shares:
            yield f"- {name}: {', '.join(shares)}; {', '.join(ends)}"
    yield ""


def _versions(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['distribution']}; {versions}."


def _promised(results: Results) -> Iterator[str]:
    yield "## What was promised, and what came out\n"
    yield "Ratios, bypass to TCP unless it says otherwise; the worst case of each row.\n"
    yield from _header(["claim", "value", "promised", "measured", "kept"])
    for verdict in limits.verdicts(results):
        limit = verdict.limit
        title = METRICS[limit.metric].title
        yield _row([limit.claim, title, limit.bound, _measured(verdict), _kept(verdict)])
    yield ""


def _measured(verdict: Verdict) -> str:
    if verdict.ratio is None:
        return "not measured"
    where = f" ({verdict.case})" if verdict.cases > 1 else ""
    return f"{verdict.ratio}{where}"


def _kept(verdict: Verdict) -> str:
    if verdict.kept is None:
        return NOT_MEASURED
    if verdict.kept:
        return "yes"
    if verdict.cases == 1:
        return "**no**" if verdict.surely else "**no**, not surely"
    surely = f"surely {verdict.surely}" if verdict.surely else "none surely"
    return f"**no**, {verdict.broken} of {verdict.cases} cases, {surely}"


def _not_faster(results: Results) -> Iterator[str]:
    """Every case that lost for certain: the whole interval is on the wrong side of 1."""
    yield "## Where it is not faster\n"
    found = [
        _row([name, case, METRICS[metric].title, str(ratio)])
        for name, section in results.sections.items()
        for case in section.cases()
        for metric in METRICS
        if (ratio := section.ratio(case, metric)) is not None
        and (ratio.high < 1 if METRICS[metric].higher_is_better else ratio.low > 1)
    ]
    if not found:
        yield "In no case was the whole interval on the wrong side of 1.\n"
        return
    yield "Every case whose whole interval is on the wrong side of 1.\n"
    yield from [*_header(["section", "case", "value", "bypass to TCP"]), *found, ""]


def _chapter(chapter: Chapter, section: Section, pictures: Sequence[str]) -> Iterator[str]:
    yield f"## {chapter.title}\n"
    yield f"{chapter.text}\n"
    for picture in pictures:
        yield f"![{chapter.title}]({picture})\n"
    for table in chapter.tables:
        rows = list(_rows(table, section))
        if rows:
            if table.title:
                yield f"### {table.title}\n"
            titles = [part for part in table.parts if part]
            yield from [*_header([*titles, *table.columns]), *rows, ""]


def _rows(table: Table, section: Section) -> Iterator[str]:
    for case in section.cases(table.cases):
        parts = case.split("/")
        cells = [cell(section, case) for cell in table.columns.values()]
        if len(parts) == len(table.parts) and any(cell != NOT_MEASURED for cell in cells):
            names = [name for name, title in zip(parts, table.parts) if title]
            yield _row([*names, *cells])
