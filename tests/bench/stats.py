# SPDX-License-Identifier: Apache-2.0
"""From measurements to statements: medians, spreads, ratios and how sure they are.

How a ratio of two variants and its interval come about: install/program/intervals.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from install.program.intervals import Interval, bootstrap_median


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
