"""Round trips on each hop of a request, without proxies in the way.

In place of the sidecars, a small C program (pingpong.c) listens and asks as the sidecar's user,
so what is timed is one hop's connection and nothing else. In C, since Python between the system
calls adds about 1 us of its own to each round and hides part of the difference.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.bed import istio
from tests.bed.pod import APP, PROXY, Pod

SOURCE = Path(__file__).with_suffix(".c")
APP_PORT = 8080
SERVICE_IP = "10.96.0.10"  # a ClusterIP: on no interface, only iptables makes it lead anywhere
SERVICE_PORT = 80
ENVOY_INBOUND_SOURCE = "127.0.0.6"
ANY = "0.0.0.0"

HopName = Literal["inbound", "outbound", "sidecars"]
HOPS: tuple[HopName, ...] = ("inbound", "outbound", "sidecars")


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
    listen_port: int


def hop(name: HopName, client: Pod, server: Pod) -> Hop:
    """One of a request's three hops from the client pod to the server pod."""
    if name == "outbound":
        return Hop(
            *(client, APP, ANY, SERVICE_IP, SERVICE_PORT),
            *(client, PROXY, istio.OUTBOUND_PORT),
        )
    if name == "sidecars":
        return Hop(
            *(client, PROXY, ANY, server.ip, APP_PORT),
            *(server, PROXY, istio.INBOUND_PORT),
        )
    return Hop(
        *(server, PROXY, ENVOY_INBOUND_SOURCE, server.ip, APP_PORT),
        *(server, APP, APP_PORT),
    )


@dataclass(frozen=True)
class RoundTrips:
    """The durations of all rounds, in nanoseconds."""

    nanoseconds: list[int]

    @property
    def median_us(self) -> float:
        return statistics.median(self.nanoseconds) / 1e3

    @property
    def p99_us(self) -> float:
        return statistics.quantiles(self.nanoseconds, n=100)[98] / 1e3


def compiled(folder: Path) -> Path:
    """Compile the C program into folder and return its path."""
    program = folder / "pingpong"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", program, SOURCE], check=True)
    return program


@contextmanager
def serving(program: Path, hop: Hop, cpus: str, size: int = 64) -> Iterator[None]:
    """The hop's listener, echoing messages of `size` bytes, ended on leaving."""
    process = hop.server.spawn(
        [program, "serve", ANY, str(hop.listen_port), str(size)],
        container=hop.server_container,
        cpus=cpus,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"pingpong serve does not listen: {hop.server.logs()}")
        yield
    finally:
        process.kill()
        process.wait()


def measure(
    program: Path, hop: Hop, cpus: str, *, size: int = 64, rounds: int = 30_000
) -> RoundTrips:
    """Send `rounds` messages of `size` bytes one after the other; times after a warm-up.

    The hop's listener must be serving.
    """
    numbers = [str(number) for number in (hop.port, size, rounds // 10, rounds)]
    out = hop.asker.run(
        [program, "ask", hop.source, hop.destination, *numbers],
        container=hop.asker_container,
        cpus=cpus,
    )
    return RoundTrips([int(line) for line in out.split()])
