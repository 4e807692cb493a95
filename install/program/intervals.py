# SPDX-License-Identifier: Apache-2.0
"""How sure a ratio is that was measured in pairs.

The two variants are measured right after each other: a slow change of the machine hits both.
The ratio is the median of the pairs' ratios; its 95 % interval comes from the percentile bootstrap
over the pairs: draw as many pairs as there are, with replacement, 4,000 times, and take the middle
95 % of the medians. With five pairs that is nearly the whole range of the pairs' ratios, which is
as much as five pairs can say.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
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


def bootstrap_median(values: Sequence[float]) -> Interval:
    """The median and its interval; the same values give the same interval.

    Raises:
        statistics.StatisticsError: there are no values.
    """
    median = statistics.median(values)
    draw = random.Random(len(values))
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    cut = int(RESAMPLES * (1 - CONFIDENCE) / 2)
    return Interval(medians[cut], median, medians[-1 - cut])
