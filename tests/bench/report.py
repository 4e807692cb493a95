# SPDX-License-Identifier: Apache-2.0
"""The Markdown report: a short page for the documents, and a file with every table."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from install.program.intervals import Interval
from tests.bench import limits, machine, plots
from tests.bench.limits import Verdict
from tests.bench.metrics import METRICS
from tests.bench.results import Results, Sample, Section
from tests.bench.tables import CHAPTERS, NOT_MEASURED, Chapter, Table

HEAD = """\
# Benchmarks

Written by `python -m tests.bench --report`; do not edit. To run it again, as root: `make bench` (25
minutes; `make bench BENCH=--quick`: two). Every table is then in `build/bench/tables.md`.

Each value is measured over TCP/IP and bypassed in turn, within seconds, every other pair in reverse
order, on pinned CPUs, after a warm-up. The plain pods are on the same node and differ in the
annotation `tcpip-bypass/enabled: "false"` alone. A ratio is the median of the pairs' ratios, bypass
to TCP. In brackets is its 95 % interval, by the percentile bootstrap over the pairs: of five pairs
nearly the whole range. What cannot bypass is measured for what the programs cost it.
"""
NOTHING = "Nothing has been measured yet."
TABLES = """\
# All tables of the benchmarks

Written by `python -m tests.bench --report`. Figures are medians over the runs with ± half of the
interquartile range, TCP → bypass: and their ratio.
"""


def write(results: Results, document: Path, pictures: Path, every_table: Path) -> None:
    """Render the page with its pictures, and all tables into a file of their own."""
    drawn = plots.draw(results, pictures)
    page = [HEAD, *_machines(results), *_promised(results)]
    page += [*_joining(results), *_lost(results)]
    tables = [TABLES, *_runs(results), *_lost_cases(results)]
    for name, chapter in CHAPTERS.items():
        if name in results.sections:
            page += [f"## {chapter.title}\n", f"{chapter.text}\n"]
            for picture in filter(drawn.__contains__, chapter.pictures):
                link = os.path.relpath(drawn[picture], document.parent)
                page.append(f"![{chapter.title}]({link})\n")
            tables += _chapter(chapter, results.sections[name])
    for path, lines in ((document, page), (every_table, tables)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines).rstrip() + "\n")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(titles: list[str]) -> list[str]:
    return [_row(titles), _row(["---"] * len(titles))]


def _machines(results: Results) -> Iterator[str]:
    """Each distinct commit, mode and machine with its sections; a warning where one was busy."""
    yield "## What was measured, and on what\n"
    sections_of: dict[str, list[str]] = {}
    for name, section in results.sections.items():
        found = section.machine
        cpu = f"{found['cpus']} x {found['cpu']}, measuring on {found['measuring_cpu']}"
        versions = dict(found["versions"])
        commit = versions.pop("tcpip-bypass", "unknown")
        programs = ", ".join(f"{name} {version}" for name, version in versions.items())
        node = f"Linux {found['kernel']}, {cpu}, {found['memory_gib']} GiB"
        ours = f"Commit {commit}, {_mode(found)}"
        control = f"congestion control {found['congestion_control']}"
        what = f"{ours}; {node}; {found['distribution']}; {control}; {programs}"
        sections_of.setdefault(what, []).append(f"{name} ({found['date'][:10]})")
    for what, names in sections_of.items():
        yield f"{what}: {', '.join(names)}.\n"
    if not sections_of:
        yield f"{NOTHING}\n"
    for name, section in results.sections.items():
        if (warning := machine.disturbance(section.machine)) is not None:
            yield f"**Section {name}: {warning}.**\n"
        if "incomplete" in section.machine:
            yield f"**Section {name} is incomplete: {section.machine['incomplete']}.**\n"


def _mode(found: Mapping[str, Any]) -> str:
    """The pods' mode, and what `auto` would be on that kernel where it is another."""
    if "mode" not in found:
        return "mode unknown"
    verdict = found["auto"]
    if found["mode"] == verdict["mode"]:
        return f"mode {found['mode']}, which is what auto decides on this kernel"
    return f"mode {found['mode']}, forced (auto decides on {verdict['mode']})"


def _joining(results: Results) -> Iterator[str]:
    """How long connections took to join, on each hop and among the most connections."""
    runs: dict[str, list[Sample]] = {}
    for name, pattern in (("hops", "*/v?/*"), ("scale", "*")):
        section = results.sections.get(name, Section({}))
        for case in section.cases(pattern):
            title = f"{case.split('/')[0]}, all sizes" if name == "hops" else case
            runs.setdefault(title, []).extend(
                each for each in section.samples if each.case == case and each.variant == "bypass"
            )
    if not runs:
        return
    yield "## How long joining took\n"
    yield "From connect to the first round trip that bypassed both ways, of busy connections.\n"
    yield from _header(["connections", "median, ms", "longest, ms", "joined within 5 s"])
    for title, samples in runs.items():
        trips = [each.values for each in samples if "median_us" in each.values]
        took = [values["joined_ms"] for values in trips if "joined_ms" in values]
        if trips:
            summed = (statistics.median, max) if took else ()
            times = [METRICS["joined_ms"].shown(each(took)) for each in summed]
            yield _row([title, *(times or [NOT_MEASURED] * 2), f"{len(took)} of {len(trips)}"])
    yield ""


def _runs(results: Results) -> Iterator[str]:
    """When and how each section was measured, and that its bypassed runs were bypassed."""
    yield "## The runs\n"
    yield "Bypassed: the part of the bytes by hop. Ends: of connections of the accelerated pods.\n"
    titles = ["section", "date", "took, s", "busy before", "stolen", "bypassed", "ends"]
    yield from _header(titles)
    for name, section in results.sections.items():
        found = section.machine
        busy = ", ".join(f"CPU {cpu}: {share:.0%}" for cpu, share in found["busy_before"].items())
        shares = [
            f"{hop} {each.share:.1%}" for hop, each in section.payload.items() if each.bypassed
        ]
        ends = [f"{count:,} {outcome}" for outcome, count in section.outcomes.items() if count]
        stolen = f"{found.get('stolen_share', 0):.1%}"
        took = str(found.get("took_s", NOT_MEASURED))
        cells = [name, found["date"], took, busy, stolen, ", ".join(shares), ", ".join(ends)]
        yield _row(cells)
    yield ""


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


@dataclass(frozen=True)
class Lost:
    """A case whose whole interval is on the wrong side of 1."""

    section: str
    case: str
    metric: str
    ratio: Interval


def _lost_of(results: Results) -> list[Lost]:
    return [
        Lost(name, case, metric, ratio)
        for name, section in results.sections.items()
        for case in section.cases()
        for metric in METRICS
        if (ratio := section.ratio(case, metric)) is not None
        and (ratio.high < 1 if METRICS[metric].higher_is_better else ratio.low > 1)
    ]


def _lost(results: Results) -> Iterator[str]:
    """What lost for certain, by section and value: how many cases, and the worst of them."""
    if not results.sections:
        return
    yield "## Where it is not faster\n"
    groups: dict[tuple[str, str], list[Lost]] = {}
    for each in _lost_of(results):
        groups.setdefault((each.section, each.metric), []).append(each)
    if not groups:
        yield "In no case was the whole interval on the wrong side of 1.\n"
        return
    yield "The cases whose whole interval is on the wrong side of 1, and the worst of them.\n"
    yield from _header(["section", "value", "cases", "worst, bypass to TCP"])
    for (name, metric), lost in groups.items():
        section = results.sections[name]
        measured = sum(section.ratio(case, metric) is not None for case in section.cases())
        sign = 1 if METRICS[metric].higher_is_better else -1
        worst = min(lost, key=lambda each: sign * each.ratio.middle)
        cases = f"{len(lost)} of {measured}"
        yield _row([name, METRICS[metric].title, cases, f"{worst.ratio} ({worst.case})"])
    yield ""


def _lost_cases(results: Results) -> Iterator[str]:
    yield "## Every case that is not faster\n"
    yield from _header(["section", "case", "value", "bypass to TCP"])
    for each in _lost_of(results):
        yield _row([each.section, each.case, METRICS[each.metric].title, str(each.ratio)])
    yield ""


def _chapter(chapter: Chapter, section: Section) -> Iterator[str]:
    yield f"## {chapter.title}\n"
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
