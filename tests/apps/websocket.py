# SPDX-License-Identifier: Apache-2.0
"""A websocket broker: what one client sends, all get."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps import application, tools
from tests.apps.application import Application, Figures
from tests.apps.place import TWO_HOPS, Place
from tests.apps.tools import PATIENCE_S

CLIENTS = 4
FRAMES = ((2000, 100), (8, 65_537), (1, 1_000_000))  # how many of each client's of which size


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """The broker."""
    with place.front.serving(tools.node("ws_broker.js", place.front.listen_port)):
        yield


def _clients(place: Place, messages: int, size: int) -> list[float]:
    url = f"ws://{place.front.address}/"
    argv = tools.node("ws_clients.js", url, CLIENTS, messages, size)
    said = place.front.client.run(argv, timeout_s=PATIENCE_S)
    return [float(line) for line in said.split()]


def check(place: Place) -> None:
    """Each client gets each client's messages, in order and whole."""
    for messages, size in FRAMES:
        assert len(_clients(place, messages, size)) == messages * CLIENTS


def load(place: Place, seconds: float) -> Figures:
    """Small messages to all; a client sends its next one when its last one has come back."""
    taken = _clients(place, 200, 100)
    messages = max(200, round(200 / (sum(taken) / CLIENTS / 1e6) * seconds))
    taken = _clients(place, messages, 100)
    return application.figures(taken, sum(taken) / CLIENTS / 1e6)


APPLICATIONS = (
    Application(
        "websocket",
        "Node, a websocket broker of four clients",
        reader="event loop",
        protocol="http",
        serve=serve,
        check=check,
        loads={"100 B to all": load},
        hops=TWO_HOPS,
    ),
)
