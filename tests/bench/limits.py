# SPDX-License-Identifier: Apache-2.0
"""What was promised, and whether a run's numbers keep it.

No test asserts these: times belong to a machine. The report states each with its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from install.program.intervals import Interval
from tests.bench.results import Results


@dataclass(frozen=True)
class Base:
    """What the bypassed value is compared with: another variant, in the same case or in another."""

    variant: str = "plain"
    case: str = ""


TCP = Base()
AF_UNIX = Base("unix", "unix/64")
NO_PODS = Base("bypass", "pods/0")
ONE_CONNECTION = Base("bypass", "connections/1")


@dataclass(frozen=True)
class Limit:
    """A bound on a ratio, over every case that matches a pattern.

    `clear` asks that the ratio's interval keeps off 1 as well. `surely`: only a case whose whole
    interval is on the wrong side of the bound breaks it.
    """

    claim: str
    section: str
    cases: tuple[str, ...]
    metric: str
    at_most: float | None = None
    at_least: float | None = None
    to: Base = TCP
    clear: bool = False
    surely: bool = False

    @property
    def bound(self) -> str:
        if self.surely:
            beyond = f"> {self.at_most:g}" if self.at_most is not None else f"< {self.at_least:g}"
            return f"not surely {beyond}"
        said = f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"
        return f"{said}, clear of 1" if self.clear else said

    def keeps(self, ratio: Interval) -> bool:
        """Whether a case's ratio keeps the bound."""
        if self.surely:
            return not self.is_surely_broken(ratio)
        if self.at_most is not None:
            return ratio.middle <= self.at_most and not (self.clear and ratio.high >= 1)
        assert self.at_least is not None
        return ratio.middle >= self.at_least and not (self.clear and ratio.low <= 1)

    def is_surely_broken(self, ratio: Interval) -> bool:
        """Whether the case's whole interval is on the wrong side of the bound."""
        if self.at_most is not None:
            return ratio.low > self.at_most
        assert self.at_least is not None
        return ratio.high < self.at_least


@dataclass(frozen=True)
class Verdict:
    """A limit's worst case; None where nothing of it was measured."""

    limit: Limit
    kept: bool | None
    case: str = ""
    ratio: Interval | None = None
    cases: int = 0
    broken: int = 0
    surely: int = 0  # of them with the whole interval on the wrong side of the bound


def verdicts(results: Results, wanted: Sequence[Limit] | None = None) -> list[Verdict]:
    """The limits, judged; all of them unless told otherwise."""
    return [_judge(limit, results) for limit in (LIMITS if wanted is None else wanted)]


def _judge(limit: Limit, results: Results) -> Verdict:
    found = list(_ratios(limit, results))
    if not found:
        return Verdict(limit, None)
    sign = 1 if limit.at_most is not None else -1
    # Of equally bad ones that which breaks the limit, if only by its interval.
    case, worst = max(found, key=lambda each: (not limit.keeps(each[1]), sign * each[1].middle))
    broken = sum(not limit.keeps(ratio) for _, ratio in found)
    surely = sum(limit.is_surely_broken(ratio) for _, ratio in found)
    return Verdict(limit, not broken, case, worst, len(found), broken, surely)


def _ratios(limit: Limit, results: Results) -> Iterator[tuple[str, Interval]]:
    section = results.sections.get(limit.section)
    if section is None:
        return
    for case in dict.fromkeys(case for pattern in limit.cases for case in section.cases(pattern)):
        ratio = section.ratio(case, limit.metric, to=limit.to.variant, to_case=limit.to.case)
        if ratio is not None:
            yield case, ratio


def _round_trips() -> Iterator[Limit]:
    for hop, bound in {"inbound": 0.60, "outbound": 0.55, "sidecars": 0.47}.items():
        claim = f"Round trip of 64 B, {hop}, to TCP"
        yield Limit(claim, "hops", (f"{hop}/v4/64",), "median_us", at_most=bound)
        claim = f"Round trip of 64 B, {hop}, IPv6"
        yield Limit(claim, "hops", (f"{hop}/v6/64",), "median_us", at_most=bound)
    claim = "Round trip of 64 B, to AF_UNIX"
    yield Limit(claim, "hops", ("*/v4/64",), "median_us", at_most=0.90, to=AF_UNIX)
    yield Limit("Round trip of 64 B, p99", "hops", ("*/v?/64",), "p99_us", at_most=0.7)
    claim = "Round trip of 64 B, ends that block in recv"
    yield Limit(claim, "hops", ("*/blocking/64",), "median_us", at_most=1.03, surely=True)


def _mesh() -> Iterator[Limit]:
    yield Limit("Mesh, 1 connection", "mesh", ("closed/http1/1",), "p50_us", at_most=0.70)
    per_cpu = "requests_per_cpu_s"
    yield Limit("Mesh, 8 connections", "mesh", ("closed/http1/8",), per_cpu, at_least=1.45)
    rest = ("closed/http1/32", "closed/mtls/*", "closed/http2/*")
    claim = "Mesh, 32 connections, mTLS, HTTP/2"
    yield Limit(claim, "mesh", rest, per_cpu, at_least=1.0, clear=True)
    for place, said in {"none": "", "filter": ", 100,000 rules in filter"}.items():
        claim, cases = f"Mesh at fixed rates{said}", (f"fixed/{place}/*",)
        for metric in ("p50_us", "cpu_us_per_request"):
            yield Limit(claim, "mesh", cases, metric, at_most=1.0, clear=True)
        yield Limit(claim, "mesh", cases, "p99_us", at_most=1.1, surely=True)


def _streaming() -> Iterator[Limit]:
    for mode, said in {
        "fresh": "Stream one way, on a fresh connection",
        "joined": "Stream one way, on a joined connection",
        "duplex": "Streams both ways at once",
    }.items():
        cases = (f"*/{mode}/*",)
        yield Limit(said, "streaming", cases, "bytes_per_s", at_least=0.97, surely=True)


def _short() -> Iterator[Limit]:
    hops = ("*",)
    yield Limit("Short connections", "churn", hops, "connect_us", at_most=1.05)
    yield Limit("Short connections", "churn", hops, "connections_per_s", at_least=0.98)
    yield Limit("Short connections", "churn", hops, "whole_p99_us", at_most=1.1)
    claim = "Large answer on a fresh connection"
    yield Limit(claim, "answers", ("*",), "connections_per_s", at_least=0.97, surely=True)


def _others() -> Iterator[Limit]:
    for case, who in {
        "out": "To off the host",
        "in": "From off the host",
        "stranger": "Pods not in the mesh",
    }.items():
        cases = (case,)
        yield Limit(f"{who}, round trip", "others", cases, "median_us", at_most=1.01)
        yield Limit(f"{who}, throughput", "others", cases, "bytes_per_s", at_least=0.99)
        yield Limit(f"{who}, connection set-up", "others", cases, "connect_us", at_most=1.03)


def _scale() -> Iterator[Limit]:
    pods, at_most = ("pods/1000",), 1.05
    yield Limit("ADD with 1,000 pods, to none", "scale", pods, "add_ms", at_most, to=NO_PODS)
    yield Limit("Round trip with 1,000 pods", "scale", pods, "median_us", at_most, to=NO_PODS)
    most = ("connections/100000",)
    claim = "Round trip with 100,000 connections, to 1"
    yield Limit(claim, "scale", most, "median_us", at_most, to=ONE_CONNECTION)


LIMITS = [*_round_trips(), *_mesh(), *_streaming(), *_short(), *_others(), *_scale()]
