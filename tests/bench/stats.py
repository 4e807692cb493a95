# SPDX-License-Identifier: Apache-2.0
"""From measurements to statements: medians, spreads, ratios and how sure they are.

The two variants are measured in pairs, one right after the other, so that a slow change of the
machine hits both. The ratio is the median of the pairs' ratios; its 95 % interval comes from the
percentile bootstrap over the pairs: draw as many pairs as there are, with replacement, 4,000 times,
and take the middle 95 % of the medians. With five pairs that is nearly the whole range of the
pairs' ratios, which is as much as five pairs can say.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

RESAMPLES = 4_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval that holds it with CONFIDENCE."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Summary:
    """The median of some runs and half of their interquartile range."""

    median: float
    spread: float


def summary(values: Sequence[float]) -> Summary:
    """The runs' median and spread.

    Raises:
        statistics.StatisticsError: there are none.
    """
    median = statistics.median(values)
    if len(values) < 2:
        return Summary(median, 0.0)
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, (upper - lower) / 2)


def ratio(above: Mapping[int, float], below: Mapping[int, float]) -> Interval:
    """The ratio of two series by round; rounds that only one of them has are left out.

    Raises:
        statistics.StatisticsError: they have no round in common.
    """
    common = sorted(above.keys() & below.keys())
    return bootstrap_median([above[each] / below[each] for each in common])


def bootstrap_median(values: Sequence[float]) -> Interval:
    """The median and its interval; the same values give the same interval."""
    median = statistics.median(values)
    draw = random.Random(len(values))
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    cut = int(RESAMPLES * (1 - CONFIDENCE) / 2)
    return Interval(medians[cut], median, medians[-1 - cut])


def percentile(histogram: Mapping[float, int], percent: float) -> float:
    """The smallest value that `percent` percent of a histogram's entries do not exceed.

    Raises:
        ValueError: the histogram is empty.
    """
    wanted = sum(histogram.values()) * percent / 100
    seen = 0
    for value, count in sorted(histogram.items()):
        seen += count
        if seen >= wanted:
            return value
    raise ValueError("a percentile of nothing")
