# SPDX-License-Identifier: Apache-2.0
"""What the demo says: tables for a person, a picture, and JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from tests.bed import cpus
from tests.bed.pairs import KINDS, Kind
from tests.bed.pingpong import HOPS, HopName
from tests.demo import modes
from tests.demo.measure import CONNECTIONS, HopRun, LoadRun, Measurements, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOREIGN_LIMIT = 0.03  # of the CPU; kernel threads and the accounting's ticks are below it
HOP_TITLES: dict[HopName, str] = {
    "outbound": "app -> Envoy",
    "sidecars": "Envoy -> Envoy",
    "inbound": "Envoy -> app",
}


def median_us(run: HopRun) -> float:
    """The value that a hop's ratio is made of."""
    return run.median_us


def latency_p50(run: LoadRun) -> float:
    """Microseconds."""
    return run.load.latency_us(50)


def latency_p99(run: LoadRun) -> float:
    """Microseconds."""
    return run.load.latency_us(99)


def hop_median(
    found: Measurements, hop: HopName, kind: Kind, value: Callable[[HopRun], float]
) -> float:
    """The median of a value over the runs of a kind on a hop."""
    runs = [run for run in found.hops if (run.hop, run.kind) == (hop, kind)]
    return statistics.median(value(run) for run in runs)


def load_median(
    found: Measurements, connections: int, kind: Kind, value: Callable[[LoadRun], float]
) -> float:
    """The median of a value over the runs of a kind with so many connections."""
    return statistics.median(value(run) for run in _loads(found, kind, connections))


def _loads(found: Measurements, kind: Kind, connections: int | None = None) -> list[LoadRun]:
    return [
        run for run in found.loads if run.kind == kind and connections in (None, run.connections)
    ]


def show(console: Console, results: Results) -> None:
    """Print the tables of each mode, and what a reader of all of them must know."""
    for found in results.modes:
        _show_mode(console, found, modes.title(found.mode, results.verdict))
    console.print()
    if results.modes:
        console.print(
            f"Each figure is the median of {results.modes[0].runs} runs, plain and bypassed in "
            "turn; ratio is bypass to TCP/IP.",
            highlight=False,
        )
    if results.verdict != "full":
        only_tcp = (
            ", so everything stays on TCP/IP unless forced" if results.verdict == "off" else ""
        )
        console.print(
            f"On this machine auto decides for mode {results.verdict}{only_tcp}: {results.reason}",
            highlight=False,
            markup=False,
        )


def _show_mode(console: Console, found: Measurements, mode: str) -> None:
    tables = {
        "Round trip of 64 bytes on each hop, in microseconds": _hop_table(found),
        "Requests from wrk -> Envoy -> Envoy -> nginx, everything on one CPU": _mesh_table(found),
        "Not our own count: what the pods' interfaces carried per 1,000 requests": _packet_table(
            found
        ),
    }
    for title, table in tables.items():
        console.print(f"\n[bold]{title}\n{mode}[/bold]", table, highlight=False)
    for line in _notes(found):
        console.print(line, highlight=False)


def _notes(found: Measurements) -> Iterator[str]:
    """What a reader of a mode's tables must know."""
    unpaired = found.payload["none"].by_tcp
    if unpaired:
        yield f"{unpaired:,} bytes went by TCP on connections that never found their other end."
    foreign = sum(run.cost.foreign_s for run in found.loads) / sum(
        run.cost.cpu_s for run in found.loads
    )
    if foreign > FOREIGN_LIMIT:
        yield (
            f"[bold]Other programs took {foreign:.0%} as much of the CPU as what was measured: "
            "the figures are disturbed. Run the demo on an idle machine.[/bold]"
        )


def _table(columns: Iterable[str]) -> Table:
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _hop_table(found: Measurements) -> Table:
    columns = (
        "hop",
        "TCP/IP\nmedian",
        "bypass\nmedian",
        "ratio",
        "TCP/IP\np99",
        "bypass\np99",
        "bytes\nbypassed",
    )
    table = _table(columns)
    for hop, title in HOP_TITLES.items():
        medians = [hop_median(found, hop, kind, median_us) for kind in KINDS]
        tails = [hop_median(found, hop, kind, lambda run: run.p99_us) for kind in KINDS]
        table.add_row(
            title,
            *(f"{value:.1f}" for value in medians),
            f"{medians[1] / medians[0]:.2f}",
            *(f"{value:.1f}" for value in tails),
            f"{found.payload[hop].share:.2%}",
        )
    return table


def _mesh_table(found: Measurements) -> Table:
    table = _table(("load", "TCP/IP", "bypass", "ratio"))

    def row(name: str, connections: int, value: Callable[[LoadRun], float]) -> None:
        plain, bypass = (load_median(found, connections, kind, value) for kind in KINDS)
        table.add_row(name, f"{plain:,.0f}", f"{bypass:,.0f}", f"{bypass / plain:.2f}")

    row("1 connection: median latency, us", 1, latency_p50)
    row("1 connection: p99 latency, us", 1, latency_p99)
    for connections in CONNECTIONS[1:]:
        name = f"{connections} connections: requests per CPU-second"
        row(name, connections, lambda run: run.requests_per_cpu_second)
    return table


def _packet_table(found: Measurements) -> Table:
    table = _table(("two pods together", "TCP/IP", "bypass"))

    def row(name: str, count: Callable[[LoadRun], int]) -> None:
        table.add_row(name, *(f"{_per_thousand(found, kind, count):,.0f}" for kind in KINDS))

    row("packets on their veths", lambda run: run.cost.veth.packets)
    row("bytes on their veths", lambda run: run.cost.veth.bytes)
    row("packets on their loopbacks", lambda run: run.cost.loopback.packets)
    row("bytes on their loopbacks", lambda run: run.cost.loopback.bytes)
    return table


def _per_thousand(found: Measurements, kind: Kind, count: Callable[[LoadRun], int]) -> float:
    runs = _loads(found, kind)
    return 1000 * sum(map(count, runs)) / sum(run.load.requests for run in runs)


def show_leftovers(console: Console, left: dict[str, list[str]]) -> None:
    """Print what is still on the machine, by kind."""
    table = Table(show_header=False)
    for kind, names in left.items():
        table.add_row(kind, "\n".join(names) or "none")
    console.print("\n[bold]Left behind on this machine[/bold]", table)


def draw(results: Results, path: Path) -> None:
    """The latencies at one connection, a row for each mode."""
    # Here, since pyplot takes a second to import and Ctrl-C must work from the start.
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    count = len(results.modes)
    figure, rows = plt.subplots(count, 2, figsize=(12, 4.5 * count), squeeze=False)
    for found, (density, tail) in zip(results.modes, rows):
        _draw_mode(found, density, tail)
        density.set_title(modes.title(found.mode, results.verdict))
    figure.suptitle("One connection: wrk -> Envoy -> Envoy -> nginx, all on one CPU")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_mode(found: Measurements, density: Axes, tail: Axes) -> None:
    """How often each latency occurred, and how many were longer."""
    limit = 3 * load_median(found, 1, "plain", latency_p50)
    for kind, label, colour in zip(KINDS, ("TCP/IP", "bypass"), ("tab:red", "tab:blue")):
        latencies = _latencies(found, kind)
        values, counts = list(latencies), list(latencies.values())
        total = sum(counts)
        median, p99 = (load_median(found, 1, kind, value) for value in (latency_p50, latency_p99))
        density.hist(
            values,
            bins=range(0, int(limit), 2),
            weights=[100 * count / total for count in counts],
            histtype="stepfilled",
            color=colour,
            alpha=0.6,
            label=f"{label}: median {median:.0f} us, p99 {p99:.0f} us",
        )
        longer = [100 * (1 - below / total) for below in itertools.accumulate(counts)]
        tail.step(values, longer, where="post", color=colour, label=label)
    density.set(xlim=(0, limit), xlabel="latency, us", ylabel="% of requests, per 2 us")
    tail.set(xscale="log", yscale="log", ylim=(0.001, 100))
    tail.set(xlabel="latency, us", ylabel="% of requests that took longer")
    for axes in (density, tail):
        axes.legend(loc="upper right")
        axes.grid(alpha=0.3)


def _latencies(found: Measurements, kind: Kind) -> dict[int, int]:
    """Microseconds to number of requests at one connection, all runs together, sorted."""
    merged: dict[int, int] = {}
    for run in _loads(found, kind, 1):
        for us, count in run.load.latencies.items():
            merged[us] = merged.get(us, 0) + count
    return dict(sorted(merged.items()))


def write_json(results: Results, left: dict[str, list[str]], path: Path) -> None:
    """Every run and what follows from them, for programs; by the configuration's mode."""
    answer = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "cpu": cpus.model(),
        "auto": {"mode": results.verdict, "reason": results.reason},
        "modes": {
            found.mode: {
                "title": modes.title(found.mode, results.verdict),
                **_mode_json(found),
            }
            for found in results.modes
        },
        "left_behind": left,
    }
    path.write_text(json.dumps(answer, indent=1) + "\n")


def _mode_json(found: Measurements) -> dict[str, Any]:
    return {
        "ratios": {
            "round_trip": {
                hop: hop_median(found, hop, "bypass", median_us)
                / hop_median(found, hop, "plain", median_us)
                for hop in HOPS
            },
            "latency_1_connection": _ratio(found, 1, latency_p50),
            **{
                f"requests_per_cpu_second_{connections}": _ratio(
                    found, connections, lambda run: run.requests_per_cpu_second
                )
                for connections in CONNECTIONS[1:]
            },
        },
        "payload": {
            hop: {"bypassed": sent.bypassed, "by_tcp": sent.by_tcp, "share": sent.share}
            for hop, sent in found.payload.items()
        },
        "hops": [dataclasses.asdict(run) for run in found.hops],
        "loads": [_load_json(run) for run in found.loads],
        "status": found.status,
    }


def _ratio(found: Measurements, connections: int, value: Callable[[LoadRun], float]) -> float:
    plain, bypass = (load_median(found, connections, kind, value) for kind in KINDS)
    return bypass / plain


def _load_json(run: LoadRun) -> dict[str, Any]:
    return {
        "kind": run.kind,
        "connections": run.connections,
        "requests": run.load.requests,
        "seconds": run.load.duration_s,
        "cpu_seconds": run.cost.cpu_s,
        "cpu_seconds_of_others": run.cost.foreign_s,
        "latency_us": {str(p): run.load.latency_us(p) for p in (50, 90, 99, 99.9)},
        "veth": dataclasses.asdict(run.cost.veth),
        "loopback": dataclasses.asdict(run.cost.loopback),
    }
