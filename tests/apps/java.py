# SPDX-License-Identifier: Apache-2.0
"""Java: the JDK's HttpServer and HttpClient; blocking sockets that ask available() first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps import application, tools
from tests.apps.application import Application, Figures, LoadRun
from tests.apps.place import Place
from tests.apps.tools import PATIENCE_S, contract, requests_of, wrk_of

# Few: over TCP the server waits 40 ms before most answers, for an acknowledgement.
GETS = (1, 1000, 65_537, 1_000_000, 10_000_000)
ECHOED = (1000, 1_000_000)
FRAMES = ((300, 1000), (50, 65_537), (3, 1_000_000))  # how many of which size


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """The contract's server."""
    with place.front.serving(tools.java("serve", place.front.listen_port)):
        yield


@contextmanager
def serve_frames(place: Place) -> Iterator[None]:
    """An echo of frames, read as available() says."""
    with place.front.serving(tools.java("frames", place.front.listen_port)):
        yield


def _ask(place: Place, count: int, size: int) -> list[float]:
    link = place.front
    argv = tools.java("ask", link.destination, link.port, count, size)
    return [float(line) for line in link.client.run(argv, timeout_s=PATIENCE_S).split()]


def check_frames(place: Place) -> None:
    """Frames there and back, compared by the client."""
    for count, size in FRAMES:
        assert len(_ask(place, count, size)) == count


def load_frames(size: int) -> LoadRun:
    """Frames of this size, one after the other."""

    def run(place: Place, seconds: float) -> Figures:
        taken = _ask(place, 500, size)
        taken = _ask(place, max(500, round(500 / (sum(taken) / 1e6) * seconds)), size)
        return application.figures(taken, sum(taken) / 1e6, size)

    return run


APPLICATIONS = (
    Application(
        "java",
        "Java, HttpServer and HttpClient",
        reader="blocking",  # the JDK's server makes a channel blocking for each exchange
        protocol="http",
        serve=serve,
        check=contract("java", gets=GETS, posts=ECHOED),
        loads={
            "1 KB": requests_of("java", 1000),
            "1 MB": requests_of("java", 1_000_000),
            "1 KB, wrk": wrk_of(1000),
        },
        advice="its server's sockets block for each exchange, and stay on TCP",
    ),
    Application(
        "java-blocking",
        "Java, blocking sockets with available()",
        reader="blocking",
        protocol="tcp",
        serve=serve_frames,
        check=check_frames,
        loads={"1 KB": load_frames(1000)},
        advice="blocking sockets stay on TCP",
    ),
)
