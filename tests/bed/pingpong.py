# SPDX-License-Identifier: Apache-2.0
"""Round trips on each hop of a request, without proxies in the way.

In place of the sidecars, a small C program (pingpong.c) listens and asks as the sidecar's user,
so what is timed is one hop's connection and nothing else. In C, since Python between the system
calls adds about 1 us of its own to each round and hides part of the difference.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.bed import addresses, ends, istio
from tests.bed.addresses import Family
from tests.bed.pod import APP, HELPER, PROXY, Pod

SOURCE = Path(__file__).with_suffix(".c")
APP_PORT = 8080
SERVICE_IP = addresses.OF["v4"].service
SERVICE_PORT = 80

HopName = Literal["inbound", "outbound", "sidecars", "direct", "service", "local"]
HOPS: tuple[HopName, ...] = ("inbound", "outbound", "sidecars")  # of a request in the mesh
PLAIN_HOPS: tuple[HopName, ...] = ("direct", "service", "local")  # of pods without a sidecar
Reader = Literal["events", "blocking"]  # an event loop, or one that sleeps in recv
WARMUP_MS = 200  # a connection joins when it is 50 ms old, with the next pass
JOIN_MS = 5_000  # so long it is waited for, where that is asked


@dataclass(frozen=True)
class Hop:
    """Who connects to whom: the asker's pod, the listener's, and what iptables makes of it."""

    asker: Pod
    asker_container: str
    source: str
    destination: str
    port: int
    server: Pod
    server_container: str
    listen: str
    listen_port: int


def hop(name: HopName, client: Pod, server: Pod, family: Family = "v4") -> Hop:
    """A hop from the client pod to the server pod.

    "service" goes through a ClusterIP (kubeproxy.py), "local" between two containers of the server.
    """
    of = addresses.OF[family]
    pod_ip = server.address(family)
    asker = {
        "outbound": (client, APP, of.any, of.service, SERVICE_PORT),
        "sidecars": (client, PROXY, of.any, pod_ip, APP_PORT),
        "inbound": (server, PROXY, of.envoy, pod_ip, APP_PORT),
        "direct": (client, APP, of.any, pod_ip, APP_PORT),
        "service": (client, APP, of.any, of.service, SERVICE_PORT),
        "local": (server, HELPER, of.any, of.loopback, APP_PORT),
    }
    listener = {
        "outbound": (client, PROXY, of.any, istio.OUTBOUND_PORT),
        "sidecars": (server, PROXY, of.any, istio.INBOUND_PORT),
    }
    return Hop(*asker[name], *listener.get(name, (server, APP, of.any, APP_PORT)))


@dataclass(frozen=True)
class RoundTrips:
    """The durations of all rounds, in nanoseconds, after so many that warmed up.

    joined_ms: how long after connect the connection bypassed, if it had by the end of the warm-up.
    """

    nanoseconds: list[int]
    warmup: int
    joined_ms: float | None

    @property
    def median_us(self) -> float:
        return statistics.median(self.nanoseconds) / 1e3

    @property
    def p99_us(self) -> float:
        return statistics.quantiles(self.nanoseconds, n=100)[98] / 1e3


@contextmanager
def serving(
    program: Path, hop: Hop, cpus: str, size: int = 64, reader: Reader = "events"
) -> Iterator[None]:
    """The hop's listener, echoing messages of `size` bytes, ended on leaving."""
    with ends.serving(program, hop, cpus, size, reader):
        yield


def measure(
    program: Path,
    hop: Hop,
    cpus: str,
    *,
    size: int = 64,
    rounds: int = 30_000,
    reader: Reader = "events",
    joins: bool = False,
) -> RoundTrips:
    """Send `rounds` messages of `size` bytes one after the other; times after a warm-up.

    The hop's listener must be serving. joins: the warm-up goes on until the connection bypasses.
    """
    patience_ms = JOIN_MS if joins else 0
    out = ends.asked(*(program, "ask", hop, cpus, size, reader, WARMUP_MS, patience_ms, rounds))
    warmup, joined_ns, *nanoseconds = map(int, out.split())
    return RoundTrips(nanoseconds, warmup, joined_ns / 1e6 if joined_ns else None)
