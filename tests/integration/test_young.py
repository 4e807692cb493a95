# SPDX-License-Identifier: Apache-2.0
"""Connections that are younger than they must be to join: bpf/data_path/pairing.h, TB_MIN_AGE."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from bpf.loader import Programs
from tests import light
from tests.fuzz.cases import heard, holds
from tests.light import CLIENT_IP, LIMITS, SERVER_IP, LightPod

YOUNG_MS = 200
PATIENCE_S = 10.0


@pytest.fixture
def pod() -> Iterator[LightPod]:
    with (
        closing(Programs(replace(LIMITS, exchanges=2, age_ms=YOUNG_MS))) as programs,
        light.accelerated(programs) as made,
    ):
        yield made


@contextmanager
def connected() -> Iterator[tuple[socket.socket, socket.socket]]:
    """(client, server), non-blocking."""
    with (
        socket.create_server((SERVER_IP, 0)) as listener,
        socket.create_connection(listener.getsockname(), source_address=(CLIENT_IP, 0)) as client,
        listener.accept()[0] as server,
    ):
        for each in (client, server):
            each.setblocking(False)
        yield client, server


def exchange(client: socket.socket, server: socket.socket) -> bool:
    client.send(b"ping")
    if heard(server, 4) != b"ping":
        return False
    server.send(b"pong")
    return heard(client, 4) == b"pong"


def test_a_short_connection_is_paired_and_no_more(pod: LightPod) -> None:
    def ask(_: LightPod) -> bool:
        with connected() as ends:
            return exchange(*ends) and exchange(*ends)

    assert holds(ask, pod)
    total = pod.total()
    assert (total.connections, total.joined) == ({"paired": 2}, 0)
    assert total.tcp_messages == {}


def test_an_older_one_joins_with_its_next_exchanges(pod: LightPod) -> None:
    def ask(pod: LightPod) -> bool:
        with connected() as ends:
            well = exchange(*ends)
            time.sleep(1.5 * YOUNG_MS / 1000)
            deadline = time.monotonic() + PATIENCE_S
            while well and pod.total().joined < 2 and time.monotonic() < deadline:
                well = exchange(*ends)
            return well and pod.total().joined == 2

    assert holds(ask, pod)
    assert pod.total().connections == {"paired": 2}
