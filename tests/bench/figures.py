# SPDX-License-Identifier: Apache-2.0
"""The figures of `estimate`, put in step with what the hops have measured.

`python -m tests.bench --report` writes them beside the page: both say the same of the same run.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.bed.pingpong import HOPS
from tests.bench.metrics import METRICS
from tests.bench.results import Section

MODULE = Path(__file__).parents[2] / "install" / "program" / "estimate" / "figures.py"


def write(hops: Section, module: Path = MODULE) -> None:
    """Put the medians of IPv4 and 64 bytes into the module's ROUND_TRIPS.

    Raises:
        ValueError: one of the hops was not measured, or the module does not name it once; the
            module is as before.
    """
    text = module.read_text()
    for hop in HOPS:
        found = [hops.summary(f"{hop}/v4/64", kind, "median_us") for kind in ("plain", "bypass")]
        medians = [METRICS["median_us"].shown(each.median) for each in found if each is not None]
        if len(medians) != len(found):
            raise ValueError(f"hop {hop} was not measured with 64 bytes over IPv4")
        now = rf"\g<1>({', '.join(medians)})"
        text, count = re.subn(rf'("{hop}": RoundTrip)\([^)]*\)', now, text)
        if count != 1:
            raise ValueError(f"{module} names hop {hop} {count} times")
    module.write_text(text)
