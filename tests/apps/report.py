# SPDX-License-Identifier: Apache-2.0
"""docs/applications.md: what runs, how fast, with which reader; the picture of it; every row."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from install.program.intervals import Interval
from tests.apps.application import Application, Reader
from tests.apps.place import HOPS
from tests.apps.registry import APPLICATIONS
from tests.bench.metrics import METRICS
from tests.bench.results import Results, Section

HEAD = """\
# Applications

Written by `python -m tests.apps --report`; do not edit. To run it again, as root: `make apps`
(`make apps APPS=redis,nginx`: only those).

Real clients and servers, over TCP/IP and bypassed in turn, every other pair in reverse order. The
client, the server and the sidecars of both pods run on one CPU, and all their time counts. On the
hop *outbound* the server stands in for the client's sidecar, on *inbound* the client for the
server's; *direct* is between two pods without sidecars; *mesh* is the whole way through two
Envoys with mTLS between them. Before it is measured, each application is checked on both kinds of
pods, every byte. A ratio is bypass to TCP: the median of the pairs' ratios.

The reader decides: sockets of event loops are bypassed; a socket that an application blocks in, or
that it splices from, stays on TCP. Each row's intervals and the share that was bypassed are then in
`build/apps/tables.md`.
"""
THROUGHPUT, CPU, P99 = "requests_per_s", "cpu_us_per_request", "p99_us"
# What no row may surely miss: a bound on the ratio, and whether it is from below.
LIMITS = {THROUGHPUT: (0.97, True), CPU: (1.03, False), P99: (1.1, False)}
MEDIAN = 1.3  # at least, of the requests per second, over all rows of event loops
COLUMNS = (THROUGHPUT, "bytes_per_s", "p50_us", P99, CPU)
ROW = re.compile(rf"\| .* \| (?:{'|'.join(get_args(Reader))}) \|(.*)")  # of the summary
RATIO = re.compile(r" \d+\.\d\d ")
DASH = "–"  # noqa: RUF001 - a dash


def is_incomplete(results: Results, name: str) -> bool:
    """Whether an application failed on some hop, or was not measured to its end."""
    section = results.sections.get(name)
    return section is None or bool(section.machine["failures"]) or "interrupted" in section.machine


def median_ratio(section: Section, pattern: str, metric: str = THROUGHPUT) -> float | None:
    """The median over the cases that match."""
    ratios = [section.ratio(case, metric) for case in section.cases(pattern)]
    found = [ratio.middle for ratio in ratios if ratio is not None]
    return statistics.median(found) if found else None


def misses(results: Results) -> Iterator[str]:
    """Each row that surely breaks a limit: its interval lies beyond. And the median of them."""
    for name, section in results.sections.items():
        for case in section.cases():
            for metric, (bound, is_lower) in LIMITS.items():
                ratio = section.ratio(case, metric)
                if ratio and (ratio.high < bound if is_lower else ratio.low > bound):
                    title = METRICS[metric].title
                    yield f"{name}, {case.replace('/', ', ')}: {title} {_interval(ratio)}"
    ratios = _ratios(results, "event loop")
    if ratios and statistics.median(ratios) < MEDIAN:
        yield f"event loops: their median is {statistics.median(ratios):.2f}, not {MEDIAN}"


def _ratios(results: Results, reader: Reader) -> list[float]:
    """The ratios of requests per second of all rows with this kind of reader."""
    return [
        ratio.middle
        for name, section in results.sections.items()
        if name in APPLICATIONS and APPLICATIONS[name].reader == reader
        for case in section.cases()
        if (ratio := section.ratio(case, THROUGHPUT))
    ]


def show(results: Results, console: Console) -> None:
    """Print failures, rows beyond the limits and each application's ratio."""
    for name, section in results.sections.items():
        for hop, said in section.machine["failures"].items():
            console.print(f"FAILED {name}, {hop}: {said}")
    for line in misses(results):
        console.print(f"BEYOND {line}")
    for name, section in results.sections.items():
        ratio = median_ratio(section, "*")
        if ratio is not None:
            console.print(f"{name}: {ratio:.2f} times the requests per second")


def write(results: Results, document: Path, picture: Path) -> None:
    """Render the page; the picture has been drawn."""
    known = _known(results)
    lines = [HEAD, *_machine(results), *_headline(results, known)]
    lines += [f"![Ratios]({os.path.relpath(picture, document.parent)})\n"]
    lines += _summary(results, known)
    beyond = list(misses(results))
    if beyond:
        lines += [
            "",
            "Rows that are surely not as good as TCP:\n",
            *(f"- {each}" for each in beyond),
        ]
    for each in known:
        failures = results.sections[each.name].machine["failures"]
        lines += [f"\n**{each.title} failed on {hop}: {said}**" for hop, said in failures.items()]
    document.write_text("\n".join(lines).rstrip() + "\n")


def write_readme(readme: Path, document: Path) -> None:
    """Bring README's counts up to the page's."""
    text = with_counts(readme.read_text(), document.read_text())
    readme.write_text(text)


def with_counts(readme: str, page: str) -> str:
    """README with the page's counts: of applications measured, and of those surely slower.

    Raises:
        ValueError: README lacks one of its sentences.
    """
    rows = [row[1].rpartition(" | ")[0] for row in map(ROW.match, page.splitlines()) if row]
    measured = sum(bool(RATIO.search(row)) for row in rows)
    title = METRICS[THROUGHPUT].title
    lines = [line for line in page.splitlines() if line.startswith("- ") and f": {title} " in line]
    slower = len({line.partition(",")[0] for line in lines})
    said = f"{slower or 'None'} of {measured} {'was' if slower < 2 else 'were'} surely slower."
    for pattern, sentence in (
        (r"(?:None|\d+) of \d+ (?:was|were) surely slower\.", said),
        (r"\[\d+ real applications\]", f"[{measured} real applications]"),
        (r"of \d+ applications, bypass", f"of {measured} applications, bypass"),
    ):
        readme, count = re.subn(pattern, sentence, readme)
        if count != 1:
            raise ValueError(f"README has {count} sentences like {sentence!r}")
    return readme


def write_tables(results: Results, document: Path) -> None:
    """Render every row."""
    known = _known(results)
    lines = [line for each in known for line in _details(results.sections[each.name], each)]
    document.write_text("\n".join(lines).strip() + "\n")


def _known(results: Results) -> list[Application]:
    return [each for name, each in APPLICATIONS.items() if name in results.sections]


def _faults(section: Section) -> Sequence[str]:
    """What this kernel gets wrong, if that kept the application from being measured."""
    found: Sequence[str] = section.machine.get("faults", ())
    return found


def _machine(results: Results) -> Iterator[str]:
    for section in list(results.sections.values())[:1]:
        found = section.machine
        yield (
            f"{found['date'][:10]}, Linux {found['kernel']}, {found['distribution']}, "
            f"{found['cpus']} x {found['cpu']}, measuring on CPU {found['measuring_cpu']}, "
            f"{found['congestion_control']}.\n"
        )


def _measured(results: Results) -> list[Application]:
    """Those that have a ratio: no fault of this kernel's kept them out, and they have a load."""
    known = _known(results)
    return [e for e in known if median_ratio(results.sections[e.name], "*") is not None]


def _headline(results: Results, known: list[Application]) -> Iterator[str]:
    measured = _measured(results)
    yield f"{len(measured)} of {len(known)} applications were measured:\n"
    for reader in get_args(Reader):
        count = sum(each.reader == reader for each in measured)
        ratios = _ratios(results, reader)
        if ratios:
            yield (
                f"- {reader}: {count} applications, {len(ratios)} rows, median "
                f"**{statistics.median(ratios):.2f}** times the requests per second "
                f"({min(ratios):.2f} to {max(ratios):.2f})"
            )
    yield ""


def _summary(results: Results, known: list[Application]) -> Iterator[str]:
    cells = {hop: [_hop_cell(results.sections[each.name], hop) for each in known] for hop in HOPS}
    hops = [hop for hop in HOPS if any(cell != DASH for cell in cells[hop])]
    yield from _header(["application", "reader", *hops, "CPU per request", "advice"])
    for each, *ratios in zip(known, *(cells[hop] for hop in hops)):
        section = results.sections[each.name]
        cpu = _number(median_ratio(section, "*", CPU))
        faults = ", ".join(_faults(section))
        advice = f"not in `full` here: this kernel fails {faults}" if faults else each.advice
        yield _row([each.title, each.reader, *ratios, cpu, advice])


def _hop_cell(section: Section, hop: str) -> str:
    if hop in section.machine["failures"]:
        return "**failed**"
    return _number(median_ratio(section, f"{hop}/*"))


def _details(section: Section, application: Application) -> Iterator[str]:
    yield f"\n## {application.title}\n"
    shown = [metric for metric in COLUMNS if any(section.ratio(c, metric) for c in section.cases())]
    if shown:
        yield from _header(["hop", "load", *(METRICS[each].title for each in shown), "bypassed"])
    for case in section.cases():
        hop, _, title = case.partition("/")
        cells = [_cell(section, case, metric) for metric in shown]
        yield _row([hop, title, *cells, _bypassed(section, case)])


def _cell(section: Section, case: str, metric: str) -> str:
    plain, bypass = (section.summary(case, kind, metric) for kind in ("plain", "bypass"))
    ratio = section.ratio(case, metric)
    if plain is None or bypass is None or ratio is None:
        return DASH
    shown = METRICS[metric].shown
    return f"{shown(plain.median)} → {shown(bypass.median)}: {_interval(ratio)}"


def _bypassed(section: Section, case: str) -> str:
    """The share of the bytes that bypassed, of those that paired connections carried."""
    found = [section.summary(case, "bypass", each) for each in ("bypassed_bytes", "tcp_bytes")]
    medians = [each.median for each in found if each is not None]
    if len(medians) < len(found):
        return DASH
    return f"{100 * medians[0] / (sum(medians) or 1):.0f} %"


def _interval(ratio: Interval) -> str:
    return f"**{ratio.middle:.2f}** [{ratio.low:.2f}, {ratio.high:.2f}]"


def _number(ratio: float | None) -> str:
    return DASH if ratio is None else f"{ratio:.2f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _header(titles: list[str]) -> list[str]:
    return [_row(titles), _row(["---"] * len(titles))]


def draw(results: Results, path: Path) -> None:
    """Each row's ratio of requests per second as a dot, a line per application."""
    # Here, since pyplot takes a second to import.
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    known = _measured(results)[::-1]
    figure, axes = plt.subplots(figsize=(8, 1 + 0.32 * len(known)))
    colours = {"event loop": "tab:green", "blocking": "tab:gray", "splice": "tab:orange"}
    for height, each in enumerate(known):
        section = results.sections[each.name]
        ratios = [r.middle for c in section.cases() if (r := section.ratio(c, THROUGHPUT))]
        axes.plot(ratios, [height] * len(ratios), "o", color=colours[each.reader], alpha=0.6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(known)), [each.name for each in known])
    axes.set_xscale("log")
    ticks = (0.5, 0.7, 1, 1.5, 2, 3, 5)
    axes.set_xticks(ticks, [str(each) for each in ticks])
    axes.minorticks_off()
    axes.set_xlabel("requests per second, bypass to TCP/IP")
    for reader, colour in colours.items():
        axes.plot([], [], "o", color=colour, alpha=0.6, label=reader)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
