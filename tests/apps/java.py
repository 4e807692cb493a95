# SPDX-License-Identifier: Apache-2.0
"""Java: the JDK's HttpServer and HttpClient; blocking sockets that ask available() or ready()."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tests.apps import application, tools
from tests.apps.application import Application, Figures, LoadRun, Serve
from tests.apps.place import TWO_HOPS, Place
from tests.apps.tools import PATIENCE_S, contract, requests_of, wrk_of

# Few: over TCP the server waits 40 ms before most answers, for an acknowledgement.
GETS = (1, 1000, 65_537, 1_000_000, 10_000_000)
ECHOED = (1000, 1_000_000)
FRAMES = ((300, 1000), (50, 65_537), (3, 1_000_000))  # how many of which size
LINES = ((300, 1000), (20, 65_537))  # each character is asked for


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """The contract's server."""
    with place.front.serving(tools.java("serve", place.front.listen_port)):
        yield


def serve_echo(command: str) -> Serve:
    """An echo of frames, read as available() says; or of lines, as BufferedReader.ready() does."""

    @contextmanager
    def running(place: Place) -> Iterator[None]:
        with place.front.serving(tools.java(command, place.front.listen_port)):
            yield

    return running


def _ask(place: Place, command: str, count: int, size: int) -> list[float]:
    link = place.front
    argv = tools.java(command, link.destination, link.port, count, size)
    return [float(line) for line in link.client.run(argv, timeout_s=PATIENCE_S).split()]


def check_echo(command: str, messages: Sequence[tuple[int, int]]) -> Callable[[Place], None]:
    """Messages there and back, compared by the client."""

    def check(place: Place) -> None:
        for count, size in messages:
            assert len(_ask(place, command, count, size)) == count

    return check


def load_echo(command: str, size: int) -> LoadRun:
    """Messages of this size, one after the other."""

    def run(place: Place, seconds: float) -> Figures:
        taken = _ask(place, command, 500, size)
        taken = _ask(place, command, max(500, round(500 / (sum(taken) / 1e6) * seconds)), size)
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
        serve=serve_echo("frames"),
        check=check_echo("ask", FRAMES),
        loads={"1 KB": load_echo("ask", 1000)},
        advice="blocking sockets stay on TCP",
    ),
    Application(
        "java-ready",
        "Java, blocking sockets with BufferedReader.ready()",
        reader="blocking",
        protocol="tcp",
        serve=serve_echo("lines"),
        check=check_echo("askLines", LINES),
        loads={"1 KB": load_echo("askLines", 1000)},
        advice="blocking sockets stay on TCP",
        hops=TWO_HOPS,
    ),
)
