# SPDX-License-Identifier: Apache-2.0
"""memcached and a client of asyncio's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps import application
from tests.apps.application import Application, Figures, LoadRun
from tests.apps.place import TWO_HOPS, Place
from tests.apps.tools import PATIENCE_S, python


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """A memcached that takes values of up to 16 MB."""
    options = ["-U", "0", "-l", "0.0.0.0", "-p", str(place.front.listen_port), "-m", "256"]
    with place.front.serving(["memcached", *options, "-I", "16m", "-t", "1"]):
        yield


def check(place: Place) -> None:
    """Values of many sizes set and got, on several connections at once."""
    argv = python("memcached_client", place.front.destination, place.front.port, "check")
    said = place.front.client.run(argv, timeout_s=PATIENCE_S)
    assert said.startswith("checked "), said


def load(size: int) -> LoadRun:
    """Gets of a value of this size."""

    def run(place: Place, seconds: float) -> Figures:
        link = place.front
        argv = python("memcached_client", link.destination, link.port, "load", seconds, size)
        said = link.client.run(argv, timeout_s=seconds + PATIENCE_S)
        return application.figures(map(float, said.split()), seconds, size)

    return run


APPLICATIONS = (
    Application(
        "memcached",
        "memcached, an asyncio client",
        reader="event loop",
        protocol="tcp",
        serve=serve,
        check=check,
        loads={"get 100 B": load(100), "get 16 KB": load(16_384)},
        hops=TWO_HOPS,
    ),
)
