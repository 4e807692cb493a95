# SPDX-License-Identifier: Apache-2.0
"""Redis and redis-benchmark, which both are event loops; redis-cli, which blocks."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps.application import Application, Figures, LoadRun
from tests.apps.place import Place
from tests.apps.tools import PATIENCE_S, python

CLIENTS = 8
CALIBRATION = 2000  # requests that say how many a load of so many seconds needs


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """A Redis that keeps nothing on disk."""
    link = place.front
    folder = link.server.folder("redis")
    options = ["--port", str(link.listen_port), "--bind", "0.0.0.0", "--dir", str(folder)]
    switches = ["--save", "", "--appendonly", "no", "--protected-mode", "no"]
    with link.serving(["redis-server", *options, *switches]):
        yield


def check(place: Place) -> None:
    """Values of many sizes set and got, pipelines, a value of 10 MB, and a benchmark's requests."""
    link = place.front
    argv = python("redis_check", link.destination, link.port)
    said = link.client.run(argv, timeout_s=PATIENCE_S)
    assert said.startswith("checked "), said
    assert _benchmark(place, "set,get", 1000, 2000).requests == 2000


def load(command: str, size: int) -> LoadRun:
    """A command with values of this size."""

    def run(place: Place, seconds: float) -> Figures:
        tried = _benchmark(place, command, size, CALIBRATION)
        requests = max(CALIBRATION, round(tried.requests / tried.seconds * seconds))
        return _benchmark(place, command, size, requests)

    return run


def _benchmark(place: Place, command: str, size: int, requests: int) -> Figures:
    """redis-benchmark; the figures of the last command."""
    link = place.front
    where = ["-h", link.destination, "-p", str(link.port), "-c", str(CLIENTS)]
    amount = ["-n", str(requests), "-d", str(size), "-t", command, "--csv"]
    out = link.client.run(["redis-benchmark", *where, *amount], timeout_s=120)
    lines = [line for line in out.splitlines() if line.startswith('"')]
    row = list(csv.DictReader(lines))[-1]
    per_second = float(row["rps"])
    p50, p99 = (float(row[f"p{p}_latency_ms"]) * 1e3 for p in (50, 99))
    return Figures(requests, requests / per_second, p50, p99, requests * size)


APPLICATIONS = (
    Application(
        "redis",
        "Redis, redis-benchmark",
        reader="event loop",
        protocol="tcp",
        serve=serve,
        check=check,
        loads={"GET 64 B": load("get", 64), "SET 16 KB": load("set", 16_384)},
    ),
)
