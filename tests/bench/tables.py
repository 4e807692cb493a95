# SPDX-License-Identifier: Apache-2.0
"""What the report says of each section: its words, and how a table's cells come about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from install.program.intervals import Interval
from tests.bench import stats
from tests.bench.metrics import METRICS
from tests.bench.results import Section

Cell = Callable[[Section, str], str]
NOT_MEASURED = "–"  # noqa: RUF001 - a dash


@dataclass(frozen=True)
class Table:
    """A table's cases, the titles of a case's parts, and its columns."""

    title: str
    cases: str
    parts: tuple[str, ...]  # what stands between the slashes; "" is left out
    columns: dict[str, Cell]


@dataclass(frozen=True)
class Chapter:
    """What the report says of a section."""

    title: str
    text: str
    tables: tuple[Table, ...]
    pictures: tuple[str, ...] = ()  # of plots.DRAWN


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _interval(ratio: Interval) -> str:
    middle, low, high = map(_ratio, (ratio.middle, ratio.low, ratio.high))
    return f"**{middle}** [{low}, {high}]"


def both(metric: str) -> Cell:
    """Medians with half of the interquartile range, TCP then bypass, and their ratio."""

    def cell(section: Section, case: str) -> str:
        ratio = section.ratio(case, metric)
        if ratio is None:
            return NOT_MEASURED
        plain, bypass = (single(variant, metric)(section, case) for variant in ("plain", "bypass"))
        return f"{plain} → {bypass}: {_interval(ratio)}"

    return cell


def single(variant: str, metric: str) -> Cell:
    """One variant's median, with half of the interquartile range where there were several runs."""

    def cell(section: Section, case: str) -> str:
        found = section.summary(case, variant, metric)
        if found is None:
            return NOT_MEASURED
        shown = METRICS[metric].shown
        return shown(found.median) + (f" ±{shown(found.spread)}" if found.spread else "")

    return cell


def to_unix(metric: str, *kept: int) -> Cell:
    """The ratio to AF_UNIX; kept are the parts of the case that the case of AF_UNIX has, too."""

    def cell(section: Section, case: str) -> str:
        ratio = section.ratio(case, metric, to="unix", to_case=_unix(case, kept))
        return NOT_MEASURED if ratio is None else _ratio(ratio.middle)

    return cell


def _unix(case: str, kept: Sequence[int]) -> str:
    parts = case.split("/")
    return "/".join(["unix", *(parts[each] for each in kept)])


def between(metric: str, of: str, to: str) -> Cell:
    """Two variants' ratio in the same case, with its interval."""

    def cell(section: Section, case: str) -> str:
        ratio = section.ratio(case, metric, of=of, to=to)
        return NOT_MEASURED if ratio is None else _interval(ratio)

    return cell


def pooled(percent: float) -> Cell:
    """A percentile of all runs' latencies together, in microseconds."""

    def cell(section: Section, case: str) -> str:
        found = [section.latencies(case, variant) for variant in ("plain", "bypass")]
        if not all(found):
            return NOT_MEASURED
        values = [stats.percentile(each, percent) for each in found]
        return " → ".join(f"{value:,.0f}" for value in values)

    return cell


def memory(metric: str, variant: str) -> Cell:
    """A value of the case's memory, which was measured once."""
    return lambda section, case: single(variant, metric)(section, f"{case}/memory")


LATENCY = {
    "p50, us": both("p50_us"),
    "p90, us": both("p90_us"),
    "p99, us": both("p99_us"),
    "p99.9 of all runs, us": pooled(99.9),
    "CPU per request, us": both("cpu_us_per_request"),
}
TO_UNIX = {
    "p50, us": both("p50_us"),
    "AF_UNIX to TCP": between("p50_us", "unix", "plain"),
    "bypass to AF_UNIX": between("p50_us", "bypass", "unix"),
    "CPU per request, us": both("cpu_us_per_request"),
    "CPU, AF_UNIX to TCP": between("cpu_us_per_request", "unix", "plain"),
    "CPU, bypass to AF_UNIX": between("cpu_us_per_request", "bypass", "unix"),
}


def by_pinning(cases: str, parts: tuple[str, ...], columns: dict[str, Cell]) -> tuple[Table, ...]:
    """A table for both ends on one CPU, and one for two; `cases` has {} in the pinning's place."""
    return tuple(
        Table(title, cases.format(pinning), parts, columns)
        for pinning, title in (("same", "On one CPU"), ("two", "On two CPUs"))
    )


STREAMS = by_pinning(
    "*/*/{}/*",
    ("hop", "stream", "", "bytes per write"),
    {"MB/s": both("bytes_per_s"), "CPU, ns per KB": both("cpu_ns_per_kb")},
)
ANSWERS = by_pinning(
    "*/{}/*",
    ("hop", "", "bytes", "bytes per write"),
    {
        "connect to close, us": both("whole_us"),
        "p99, us": both("whole_p99_us"),
        "CPU per connection, us": both("cpu_us_per_connection"),
    },
)
CHAPTERS = {
    "hops": Chapter(
        "Round trips on each hop",
        "A small C program takes the sidecar's and the application's place; both ends are on one "
        "CPU. Each end is an event loop: a non-blocking socket, and epoll_wait before each recv. "
        "Measured once the connection has joined. AF_UNIX stream sockets on the same CPU are the "
        "limit. Ends that block in recv stay on TCP.",
        (
            Table(
                "",
                "[!u]*/*/*",
                ("hop", "IP", "bytes"),
                {
                    "median, us": both("median_us"),
                    "p99, us": both("p99_us"),
                    "joined after, ms": single("bypass", "joined_ms"),
                    "median to AF_UNIX": to_unix("median_us", 2),
                },
            ),
        ),
        ("size",),
    ),
    "streaming": Chapter(
        "Streams",
        "One connection between two event loops; the writer writes as fast as it can, the reader "
        "takes up to 256 KB at a time. The ends share a CPU or have one each. Measured for 80 ms "
        "after 40 ms, the mean of two connections.\n\n"
        "A socket joins after bytes there and back, and a direction goes by TCP once 256 KB were "
        "sent without an answer. So a stream one way goes by TCP: from its first byte on where the "
        "connection is fresh, soon where it has joined (200 ms of questions and answers before "
        "it). Duplex: both ends read and write, also after 200 ms.",
        STREAMS,
    ),
    "mesh": Chapter(
        "The whole mesh",
        "Load generator, Envoy, Envoy, nginx, all on one CPU; all their CPU time counts. At a "
        "fixed rate the CPU rests between requests and finds its caches cold.",
        (
            Table(
                "So many connections, each asks again when it is answered (wrk; HTTP/2: h2load)",
                "closed/*",
                ("", "protocol", "connections"),
                {**LATENCY, "requests per CPU-second": both("requests_per_cpu_s")},
            ),
            Table(
                "So many requests a second, over 16 connections, latency from when each was due; "
                "rules: 100,000 iptables rules in the node's namespace, in the table named",
                "fixed/*",
                ("", "rules", "body", "requests/s"),
                LATENCY,
            ),
            Table(
                "Beside a mesh whose hops are AF_UNIX: so many connections that ask again (h2load)",
                "unix/*",
                ("", "connections"),
                TO_UNIX,
            ),
        ),
        ("latency", "cpu"),
    ),
    "churn": Chapter(
        "Short connections",
        "Connect, one request of 64 bytes, one answer, close; one after the other, both ends on "
        "one CPU. A connection is looked at after 32 segments, so these stay on TCP, and the "
        "ratio is what the programs cost.",
        (
            Table(
                "",
                "*",
                ("hop",),
                {
                    "connections/s": both("connections_per_s"),
                    "CPU per connection, us": both("cpu_us_per_connection"),
                    "connect, us": both("connect_us"),
                    "connect to close, p99, us": both("whole_p99_us"),
                },
            ),
        ),
    ),
    "answers": Chapter(
        "Large answers",
        "Connect, one request of 64 bytes, one large answer in writes of so many bytes, close; one "
        "after the other. One exchange is too few to join: the answer goes by TCP. Both ends are "
        "event loops; they share a CPU or have one each.",
        ANSWERS,
    ),
    "others": Chapter(
        "Connections that cannot gain",
        "out, in: between an accelerated pod and a pod beyond the node's bridge that is not. "
        "stranger: two pods outside the mesh, with our programs loaded and an accelerated pod next "
        "to them, against a node with neither.",
        (
            Table(
                "",
                "*",
                ("pods",),
                {
                    "round trip, us": both("median_us"),
                    "MB/s, writes of 64 KB": both("bytes_per_s"),
                    "connect, us": both("connect_us"),
                },
            ),
        ),
    ),
    "scale": Chapter(
        "Scale",
        "Beside so many attached pods, or live and silent connections: one more pod's ADD "
        "(VERSION is the plugin's start alone), and a round trip of 64 bytes from a sidecar to "
        "its application, once its connection has joined. A pass visits all open files of a pod, "
        "also those of the silent connections. Kernel memory: slab, per-CPU and vmalloc, from "
        "/proc/meminfo.",
        (
            Table(
                "Pods",
                "pods/*",
                ("", "other pods"),
                {
                    "ADD, ms": single("bypass", "add_ms"),
                    "VERSION, ms": single("bypass", "version_ms"),
                    "all maps, MiB": single("memory", "map_bytes"),
                    "kernel memory per pod, KiB": single("memory", "bytes_per_pod"),
                    "round trip, us": both("median_us"),
                    "joined after, ms": single("bypass", "joined_ms"),
                },
            ),
            Table(
                "Connections",
                "connections/*[0-9]",
                ("", "other connections"),
                {
                    "round trip, us": both("median_us"),
                    "joined after, ms": single("bypass", "joined_ms"),
                    "kernel memory per connection, KiB: TCP": memory(
                        "bytes_per_connection", "plain"
                    ),
                    "bypass": memory("bytes_per_connection", "bypass"),
                },
            ),
        ),
    ),
}
