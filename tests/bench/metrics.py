# SPDX-License-Identifier: Apache-2.0
"""The values of a run by name: how they are shown, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A value's title with its unit, what it is multiplied with to be in it, and its better end."""

    title: str
    scale: float = 1.0
    higher_is_better: bool = False

    def shown(self, value: float) -> str:
        """Three significant digits, and no exponent."""
        scaled = value * self.scale
        digits = 0 if abs(scaled) >= 100 else 1 if abs(scaled) >= 10 else 2
        return f"{scaled:,.{digits}f}"


METRICS = {
    "median_us": Metric("median, us"),
    "joined_ms": Metric("joined after, ms"),
    "p50_us": Metric("p50, us"),
    "p90_us": Metric("p90, us"),
    "p99_us": Metric("p99, us"),
    "bytes_per_s": Metric("MB/s", 1e-6, higher_is_better=True),
    "cpu_ns_per_kb": Metric("CPU, ns per KB"),
    "requests_per_s": Metric("requests/s", higher_is_better=True),
    "requests_per_cpu_s": Metric("requests per CPU-second", higher_is_better=True),
    "cpu_us_per_request": Metric("CPU per request, us"),
    "busy_us_per_request": Metric("busy CPU per request (/proc/stat), us"),
    "connections_per_s": Metric("connections/s", higher_is_better=True),
    "cpu_us_per_connection": Metric("CPU per connection, us"),
    "connect_us": Metric("connect, us"),
    "whole_us": Metric("from connect to close, us"),
    "whole_p99_us": Metric("from connect to close, p99, us"),
    "add_ms": Metric("ADD, ms"),
    "add_cpu_ms": Metric("ADD, CPU, ms"),
    "del_ms": Metric("DEL, ms"),
    "version_ms": Metric("VERSION, ms"),
    "map_bytes": Metric("all maps, MiB", 2**-20),
    "bytes_per_pod": Metric("kernel memory per pod, KiB", 2**-10),
    "bytes_per_connection": Metric("kernel memory per connection (both ends), KiB", 2**-10),
}
