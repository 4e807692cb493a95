# SPDX-License-Identifier: Apache-2.0
"""The load: wrk, run in the client's pod as its application."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.bed.pod import APP, Pod

SCRIPT = Path(__file__).with_suffix(".lua")


@dataclass(frozen=True)
class Load:
    """One run of a load generator; latencies maps microseconds to how many requests took them."""

    requests: int
    duration_s: float
    latencies: dict[int, int]

    def latency_us(self, percentile: float) -> int:
        """The smallest latency that `percentile` percent of the requests did not exceed."""
        wanted = sum(self.latencies.values()) * percentile / 100
        seen = 0
        for us, count in sorted(self.latencies.items()):
            seen += count
            if seen >= wanted:
                return us
        raise ValueError("no request was answered")


def run(
    pod: Pod,
    url: str,
    *,
    connections: int,
    seconds: int,
    cpus: str = "-",
    container: str = APP,
    header: str = "",
) -> Load:
    """Keep `connections` requests under way for some seconds, each with the header if it is given.

    Raises:
        RuntimeError: a request failed or was not answered with success.
    """
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(SCRIPT)]
    options += ["-H", header] if header else []
    out = pod.run(["wrk", *options, url], container=container, cpus=cpus, timeout_s=seconds + 30)
    load, socket_errors, status_errors = parse(out)
    if load.requests == 0 or socket_errors or status_errors:
        raise RuntimeError(
            f"wrk in pod {pod.name}: {load.requests} answers, {socket_errors} connection errors, "
            f"{status_errors} answers that were no success\n{out}"
        )
    return load


def parse(out: str) -> tuple[Load, int, int]:
    """What wrk.lua printed: the load, failed connections or requests, answers without success."""
    latencies: dict[int, int] = {}
    totals: list[int] = []
    for line in out.splitlines():
        kind, *numbers = line.split() or [""]
        if kind == "totals":
            totals = [int(number) for number in numbers]
        elif kind == "latency":
            us, count = map(int, numbers)
            latencies[us] = latencies.get(us, 0) + count
    requests, duration_us, socket_errors, status_errors = totals
    return Load(requests, duration_us / 1e6, latencies), socket_errors, status_errors
