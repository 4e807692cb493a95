# SPDX-License-Identifier: Apache-2.0
"""What was measured: every number of every run, in one JSON file that outlives the run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from install.program.intervals import Interval
from tests.bed.pairs import Bytes
from tests.bench import stats
from tests.bench.stats import Summary

SIGNIFICANT_DIGITS = 3  # of a latency in a histogram; the percentiles are made before rounding


@dataclass(frozen=True)
class Sample:
    """One run. `case` says what was run ("inbound/v4/64"), `variant` over what.

    Values are named with their unit (median_us, bytes_per_s). `latencies` maps microseconds to how
    many took them.
    """

    case: str
    variant: str  # "plain", "bypass", "unix"; others where a load says so
    round: int
    values: dict[str, float]
    latencies: dict[float, int] = field(default_factory=dict)


@dataclass
class Section:
    """One kind of load: when and on what it was measured, and all of its runs.

    payload, by hop, and outcomes, of the ends of connections, are what the data path counted for
    the accelerated pods in the meantime.
    """

    machine: dict[str, Any]  # machine.facts()
    samples: list[Sample] = field(default_factory=list)
    payload: dict[str, Bytes] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)

    def cases(self, pattern: str = "*") -> list[str]:
        """The cases that match, in the order in which they were measured."""
        return [
            case
            for case in dict.fromkeys(sample.case for sample in self.samples)
            if fnmatchcase(case, pattern)
        ]

    def series(self, case: str, variant: str, metric: str) -> dict[int, float]:
        """A value by round; empty when it was not measured."""
        return {
            sample.round: sample.values[metric]
            for sample in self.samples
            if (sample.case, sample.variant) == (case, variant) and metric in sample.values
        }

    def summary(self, case: str, variant: str, metric: str) -> Summary | None:
        """A value over all rounds, None when it was not measured."""
        series = self.series(case, variant, metric)
        return stats.summary(list(series.values())) if series else None

    def ratio(
        self,
        case: str,
        metric: str,
        *,
        of: str = "bypass",
        to: str = "plain",
        to_case: str = "",
    ) -> Interval | None:
        """One variant's value in terms of another's, None when they share no round.

        to_case: where the other is another case, too.
        """
        above = self.series(case, of, metric)
        below = self.series(to_case or case, to, metric)
        return stats.ratio(above, below) if above.keys() & below.keys() else None

    def latencies(self, case: str, variant: str) -> dict[float, int]:
        """All rounds' latencies together."""
        merged: dict[float, int] = {}
        for sample in self.samples:
            if (sample.case, sample.variant) == (case, variant):
                for value, count in sample.latencies.items():
                    merged[value] = merged.get(value, 0) + count
        return merged


@dataclass
class Results:
    """All sections measured so far, by name."""

    sections: dict[str, Section] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write everything; a reader sees the old file or the new one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(asdict(self), separators=(",", ":")) + "\n")
        new.replace(path)


def load(path: Path) -> Results:
    """What save() wrote."""
    content = json.loads(path.read_text())
    return Results({name: _section(each) for name, each in content["sections"].items()})


def _section(content: dict[str, Any]) -> Section:
    payload = {hop: Bytes(**counted) for hop, counted in content["payload"].items()}
    samples = list(map(_sample, content["samples"]))
    return Section(content["machine"], samples, payload, content["outcomes"])


def _sample(content: dict[str, Any]) -> Sample:
    latencies = {float(value): count for value, count in content.pop("latencies").items()}
    return Sample(**content, latencies=latencies)


def histogram(latencies_us: Iterable[float] | Mapping[int, int]) -> dict[float, int]:
    """Latencies, or their counts, rounded to SIGNIFICANT_DIGITS, as a histogram."""
    counted: dict[float, int] = {}
    for value, count in _counted(latencies_us):
        rounded = float(f"{value:.{SIGNIFICANT_DIGITS}g}")
        counted[rounded] = counted.get(rounded, 0) + count
    return counted


def _counted(latencies: Iterable[float] | Mapping[int, int]) -> Iterator[tuple[float, int]]:
    if isinstance(latencies, Mapping):
        yield from latencies.items()
    else:
        yield from ((value, 1) for value in latencies)
