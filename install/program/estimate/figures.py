# SPDX-License-Identifier: Apache-2.0
"""What one exchange costs and what it would, from the run that docs/benchmarks.md reports.

Medians of "Round trips on each hop" (build/bench/tables.md), IPv4, 64 bytes each way, both ends on
one CPU: so a round trip is also the CPU time of both ends. `python -m tests.bench --report` writes
them here and the page; tests/unit/test_estimate.py holds one against the other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RoundTrip:
    """Microseconds of one message there and one back."""

    tcp_us: float
    bypass_us: float

    @property
    def saved_us(self) -> float:
        return self.tcp_us - self.bypass_us


ROUND_TRIPS = {
    "inbound": RoundTrip(15.5, 9.30),
    "outbound": RoundTrip(16.3, 9.20),
    "sidecars": RoundTrip(19.4, 9.37),
}
# Hops without a sidecar were not measured by themselves: inside a pod as towards the application,
# between two as between sidecars.
_LIKE = {"local": "inbound", "direct": "sidecars"}


def of(hop: str) -> RoundTrip:
    """The figures for a hop of bpf/abi.py, but for `none`."""
    return ROUND_TRIPS[_LIKE.get(hop, hop)]
