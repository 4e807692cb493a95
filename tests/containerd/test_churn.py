# SPDX-License-Identifier: Apache-2.0
"""Pods by the hundred, eight at a time, with and without our entry in the chain."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from bpf import pins
from tests.containerd.bed import AT_ONCE, BYPASS, PLAIN, RuntimeBed
from tests.containerd.containerd import CniCalls
from tests.containerd.cri import CriError
from tests.containerd.inventory import Inventory, attached

PODS = int(os.environ.get("TCPIP_BYPASS_CHURN_PODS", "60"))  # per chain


@dataclass(frozen=True)
class Life:
    """How it went with one pod; run_s and end_s are seconds of CRI calls."""

    accelerated: bool = False
    run_s: float = 0
    end_s: float = 0
    failure: str = ""
    left: list[str] = field(default_factory=list)


@dataclass
class Tally:
    """What one chain's pods came to; left is what was still there when they had ended."""

    lives: list[Life] = field(default_factory=list)
    calls: CniCalls = field(default_factory=CniCalls)
    left: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        return [life.failure for life in self.lives if life.failure]

    @property
    def accelerated(self) -> int:
        return sum(life.accelerated for life in self.lives)


def test_churn(bed: RuntimeBed, capsys: pytest.CaptureFixture[str]) -> None:
    tallies = {PLAIN: Tally(), BYPASS: Tally()}
    for batch in batches(PODS):
        for chain, tally in tallies.items():  # alternated, so that both meet the same machine
            churn(bed, chain, batch, tally)
    left = bed.leftovers()
    failures = [failure for tally in tallies.values() for failure in tally.failures]
    with capsys.disabled():
        print("\n\n" + table(tallies) + "\n\n" + listing(left))

    assert failures == []
    for tally in tallies.values():
        assert len(tally.lives) == PODS
        assert tally.left == []
        assert tally.calls == CniCalls(adds=PODS, dels=2 * PODS, errors=0)  # Stop, then Remove
    assert tallies[BYPASS].accelerated == PODS
    assert tallies[PLAIN].accelerated == 0
    assert not any(left.values())


def batches(total: int) -> Iterator[int]:
    """AT_ONCE again and again until it makes total."""
    while total > 0:
        yield min(total, AT_ONCE)
        total -= AT_ONCE


def churn(bed: RuntimeBed, chain: str, pods: int, tally: Tally) -> None:
    """Make and end pods, all at once, and look what they have left."""
    bed = bed.as_it_is()  # what an earlier batch has left is counted already
    before = bed.containerd.cni_calls()
    with ThreadPoolExecutor(pods) as pool:
        lives = list(pool.map(lambda number: live(bed, chain, f"{chain}-{number}"), range(pods)))
    tally.calls += bed.containerd.cni_calls() - before
    tally.lives += lives
    tally.left += [what for life in lives for what in life.left]
    tally.left += [f"{kind}: {what}" for kind, found in bed.leftovers().items() for what in found]


def live(bed: RuntimeBed, chain: str, name: str) -> Life:
    """One pod's life, looked at while its cgroup, which would hide a left-over, still is."""
    with bed.pod(name, handler=chain) as pod:
        try:
            began = time.monotonic()
            sandbox = pod.run_sandbox()
            run_s = time.monotonic() - began
            accelerated = attached(pod.cgroup) == [pins.SOCK_OPS_NAME]
            began = time.monotonic()
            pod.end_sandbox(sandbox)
            end_s = time.monotonic() - began
        except CriError as error:
            return Life(failure=str(error), left=attached(pod.cgroup))
        return Life(accelerated, run_s, end_s, left=attached(pod.cgroup))


def table(tallies: dict[str, Tally]) -> str:
    """The tallies side by side; times are medians over a chain's pods."""
    plain, bypass = tallies[PLAIN], tallies[BYPASS]
    rows = [("", "bridge", "bridge + tcpip-bypass")]
    for what, value in ROWS.items():
        rows.append((what, value(plain), value(bypass)))
    return "\n".join(f"{what:<28}{left:>10}{right:>24}" for what, left, right in rows)


def listing(left: Inventory) -> str:
    """What the node holds that it did not when it was fresh."""
    return "left on the node\n" + "\n".join(
        f"  {kind:<22}{', '.join(found) or '-'}" for kind, found in left.items()
    )


def median(times_s: Iterable[float]) -> str:
    return f"{statistics.median(times_s) * 1000:.0f} ms"


ROWS: dict[str, Callable[[Tally], str]] = {
    f"pods, {AT_ONCE} at a time": lambda tally: str(len(tally.lives)),
    "  of these accelerated": lambda tally: str(tally.accelerated),
    "CNI ADD": lambda tally: str(tally.calls.adds),
    "CNI DEL": lambda tally: str(tally.calls.dels),
    "CNI errors": lambda tally: str(tally.calls.errors),
    "failed CRI calls": lambda tally: str(len(tally.failures)),
    "left-overs": lambda tally: str(len(tally.left)),
    "RunPodSandbox": lambda tally: median(life.run_s for life in tally.lives),
    "Stop- + RemovePodSandbox": lambda tally: median(life.end_s for life in tally.lives),
}
