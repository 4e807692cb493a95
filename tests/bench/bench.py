# SPDX-License-Identifier: Apache-2.0
"""One run of the benchmark, as the sections see it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console

from tests.bed import Bed, cni, congestion, open_bed, pairs
from tests.bed.cpus import Cpus
from tests.bed.pairs import Bytes, Pair
from tests.bench import results
from tests.bench.results import Sample, Section

Effort = Literal["full", "quick", "smoke"]  # smoke: does it run at all


@contextmanager
def measured_bed(subnets: Sequence[str] = cni.IPV4) -> Iterator[Bed]:
    """A bed; its pods have the congestion control that nodes usually have."""
    with congestion.allowed(congestion.USUAL), open_bed(subnets=subnets) as bed:
        yield replace(bed, congestion=congestion.USUAL)


@dataclass
class Bench:
    """What a section measures with, and where it puts what it found."""

    effort: Effort
    cpus: Cpus
    section: Section
    console: Console

    @property
    def cpu(self) -> str:
        return self.cpus.measured

    def peers(self, pinnings: Iterable[str]) -> list[tuple[str, str]]:
        """Each pinning's name with the other end's CPU; "two" only where there are two CPUs."""
        cpus = {"same": self.cpu, "two": self.cpus.others[-1] if self.cpus.others else None}
        return [(name, cpu) for name in pinnings if (cpu := cpus[name]) is not None]

    @contextmanager
    def bed(self, subnets: Sequence[str] = cni.IPV4) -> Iterator[Bed]:
        """A bed; the section says in which mode its pods are, and what `auto` would be here."""
        with measured_bed(subnets) as bed:
            status = bed.node.status()
            verdict = {"mode": status["mode"], "reason": status["reason"]}
            self.section.machine["mode"] = bed.chain.plugins[-1]["mode"]
            self.section.machine["auto"] = verdict
            yield bed

    def record(
        self,
        case: str,
        variant: str,
        number: int,
        values: dict[str, float],
        latencies_us: Iterable[float] | Mapping[int, int] = (),
    ) -> None:
        """Keep a run, the `number`th of its kind."""
        kept = results.histogram(latencies_us)
        self.section.samples.append(Sample(case, variant, number, values, kept))

    def keep_counters(self, bed: Bed, accelerated: Pair) -> None:
        """Keep what the data path has counted for the accelerated pods of a bed, at its end."""
        for hop, found in pairs.payload(bed, accelerated).items():
            self.section.payload[hop] = self.section.payload.get(hop, Bytes(0, 0)) + found
        for outcome, count in pairs.outcomes(bed, accelerated).items():
            self.section.outcomes[outcome] = self.section.outcomes.get(outcome, 0) + count

    def tell(self, case: str, *metrics: str) -> None:
        """Print what a case has come to."""
        said = [f"{metric} {self._in_words(case, metric)}" for metric in metrics]
        self.console.print(f"  {case}: {'; '.join(said)}")

    def _in_words(self, case: str, metric: str) -> str:
        found = [
            self.section.summary(case, variant, metric) for variant in ("unix", "plain", "bypass")
        ]
        medians = " -> ".join(f"{each.median:,.4g}" for each in found if each is not None)
        ratio = self.section.ratio(case, metric)
        return medians if ratio is None else f"{medians}, ratio {ratio}"
