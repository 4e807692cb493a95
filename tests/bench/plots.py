# SPDX-License-Identifier: Apache-2.0
"""The pictures: ratio against message size, latency distributions, CPU per request."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bed.pairs import KINDS
from tests.bench.results import Results, Section

COLOURS = {"plain": "tab:red", "bypass": "tab:blue"}
TITLES = {"plain": "TCP/IP", "bypass": "bypass"}
DPI = 80
COLOUR_COUNT = 48  # a third of the size: the report's pictures are in the repository


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Draw what there are results for; the files by the picture's name."""
    # Here, since pyplot takes a second to import.
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for name, (sections, paint) in DRAWN.items():
        if not all(each in results.sections for each in sections):
            continue
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
        paint(results, axes)
        for each in axes:
            each.grid(alpha=0.3)
            if each.get_legend_handles_labels()[0]:
                each.legend(fontsize="small")
        figure.tight_layout()
        drawn[name] = folder / f"bench-{name}.png"
        figure.savefig(drawn[name], dpi=DPI)
        plt.close(figure)
        with Image.open(drawn[name]) as picture:
            picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=COLOUR_COUNT).save(
                drawn[name], optimize=True
            )
    return drawn


def _by_size(results: Results, axes: Any) -> None:
    """Bypass to TCP: round trips, and streams on one CPU."""
    round_trips, streams = axes
    _ratios(round_trips, results.sections["hops"], "*/v?/*", "median_us")
    round_trips.set(title="Round trip", ylim=(0, 1.2), ylabel="time, bypass to TCP/IP")
    _ratios(streams, results.sections["streaming"], "*/same/*", "bytes_per_s")
    streams.set(title="Stream, one CPU", ylabel="throughput, bypass to TCP/IP")


def _ratios(axes: Any, section: Section, cases: str, metric: str) -> None:
    """One line per kind of case; the last part of a case is a size."""
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for case in section.cases(cases):
        ratio = section.ratio(case, metric)
        if ratio is not None:
            name, _, size = case.rpartition("/")
            lines.setdefault(name, []).append((int(size), ratio.middle, ratio.low, ratio.high))
    for name, points in lines.items():
        sizes, middles, lows, highs = zip(*points)
        below = [middle - low for middle, low in zip(middles, lows)]
        above = [high - middle for middle, high in zip(middles, highs)]
        axes.errorbar(sizes, middles, (below, above), marker=".", linewidth=1, label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="bytes per message")
    axes.set_xscale("log", base=2)


def _latency(results: Results, axes: Any) -> None:
    """How many requests took longer: one connection, and a fixed rate."""
    mesh = results.sections["mesh"]
    _tails(axes[0], mesh, "closed/*/1")
    axes[0].set_title("One connection, asking again when answered")
    _tails(axes[1], mesh, "fixed/none/small/*")
    axes[1].set_title("So many small answers a second")


def _tails(axes: Any, section: Section, cases: str) -> None:
    styles = itertools.cycle(("-", "--", ":"))
    for case, style in zip(section.cases(cases), styles):
        for kind in KINDS:
            latencies = dict(sorted(section.latencies(case, kind).items()))
            total = sum(latencies.values())
            longer = [
                100 * (1 - below / total) for below in itertools.accumulate(latencies.values())
            ]
            label = f"{TITLES[kind]}, {case.partition('/')[2]}"
            axes.step(
                list(latencies), longer, style, where="post", color=COLOURS[kind], label=label
            )
    axes.set(xscale="log", yscale="log", ylim=(0.01, 100))
    axes.set(xlabel="latency, us", ylabel="% of requests that took longer")


def _cpu(results: Results, axes: Any) -> None:
    """CPU time per request: closed loops, and fixed rates without further rules."""
    _bars(axes[0], results.sections["mesh"], "closed/*")
    axes[0].set_title("Connections that ask again when answered")
    _bars(axes[1], results.sections["mesh"], "fixed/none/*")
    axes[1].set_title("So many requests a second")


def _bars(axes: Any, section: Section, pattern: str) -> None:
    metric = "cpu_us_per_request"
    cases = [case for case in section.cases(pattern) if section.ratio(case, metric) is not None]
    for shift, kind in zip((-0.2, 0.2), KINDS):
        found = [section.summary(case, kind, metric) for case in cases]
        heights = [each.median for each in found if each is not None]
        spreads = [each.spread for each in found if each is not None]
        places = [place + shift for place in range(len(heights))]
        axes.bar(places, heights, 0.4, yerr=spreads, color=COLOURS[kind], label=TITLES[kind])
    names = [case.partition("/")[2] for case in cases]
    axes.set_xticks(range(len(cases)), names, rotation=45, ha="right", fontsize="small")
    axes.set(ylabel="CPU per request, us")


DRAWN: dict[str, tuple[tuple[str, ...], Callable[[Results, Any], None]]] = {
    "size": (("hops", "streaming"), _by_size),
    "latency": (("mesh",), _latency),
    "cpu": (("mesh",), _cpu),
}
