# SPDX-License-Identifier: Apache-2.0
"""The agent's server: what it answers, and that silent clients cannot keep others out."""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from install.program.agent import http as served
from install.program.agent.http import MAX_CONNECTIONS, Health, Server, parse_address
from install.program.agent.metrics import Metrics
from install.program.node import Node

BROKEN = "a bug in the collector"


class BrokenMetrics:
    """A collector with a mistake in it."""

    def render(self) -> bytes:
        raise ValueError(BROKEN)


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
def server(health: Health) -> Iterator[Server]:
    metrics = Metrics(Node(Path("/no/bpffs"), Path("/no/state")))
    with served.serve("127.0.0.1:0", metrics, health) as running:
        yield running


def get(server: Server, path: str, method: str = "GET") -> tuple[int, str]:
    """Status and body."""
    connection = http.client.HTTPConnection(*server.address, timeout=10)
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def threads() -> int:
    return len(threading.enumerate())


def wait_until_threads(count: int) -> None:
    deadline = time.monotonic() + 10
    while threads() > count:
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def test_ready_without_a_reason_against_it(server: Server, health: Health) -> None:
    assert get(server, "/readyz") == (503, "starting\n")
    health.set_ready([])
    assert get(server, "/readyz") == (200, "ok\n")
    health.remarks = lambda: ["mode is off: order wrong"]
    assert get(server, "/readyz") == (200, "ok\nmode is off: order wrong\n")
    health.set_ready(["the self-test's mode is off", "no conflist"])
    assert get(server, "/readyz?verbose") == (503, "the self-test's mode is off\nno conflist\n")
    assert get(server, "/healthz") == (200, "ok\n")


def test_startup_is_answered_when_it_is_over(server: Server, health: Health) -> None:
    answers: list[tuple[int, str]] = []
    probe = threading.Thread(target=lambda: answers.append(get(server, "/startupz")))
    probe.start()
    probe.join(0.3)
    assert answers == []  # a 503 meanwhile would be a Warning event
    health.set_ready(["the self-test's mode is off"])
    health.set_started()
    probe.join(10)
    assert answers == [(200, "ok\n")]
    assert get(server, "/readyz")[0] == 503


def test_a_start_that_takes_too_long(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "START_PATIENCE_S", 0.01)
    assert get(server, "/startupz") == (503, "starting\n")


def test_an_agent_that_is_stuck_is_neither_alive_nor_ready(
    server: Server, health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    health.set_ready([])
    later = time.monotonic() + 121
    monkeypatch.setattr(time, "monotonic", lambda: later)
    reason = "the agent's loop has not come round for 121 s\n"
    assert get(server, "/healthz") == (503, reason)
    assert get(server, "/readyz") == (503, reason)
    health.beat()
    assert get(server, "/healthz") == (200, "ok\n")


def test_metrics(server: Server) -> None:
    status, body = get(server, "/metrics")
    assert status == 200
    assert "\ntcpip_bypass_loaded 0.0\n" in body


def test_other_paths_and_methods(server: Server) -> None:
    assert get(server, "/")[0] == 404
    assert get(server, "/healthz/../metrics")[0] == 404
    assert get(server, "/healthz", "POST")[0] == 501
    assert get(server, "/readyz", "HEAD") == (503, "")


def test_a_mistake_in_the_collector_is_told_and_survived(
    health: Health, capfd: pytest.CaptureFixture[str]
) -> None:
    with served.serve("127.0.0.1:0", cast(Metrics, BrokenMetrics()), health) as server:
        with pytest.raises(http.client.RemoteDisconnected):
            get(server, "/metrics")
        assert BROKEN in capfd.readouterr().err
        assert get(server, "/healthz") == (200, "ok\n")


def test_silent_clients_block_no_other_and_make_no_threads(server: Server) -> None:
    before = threads()
    silent = [socket.create_connection(server.address) for _ in range(5 * MAX_CONNECTIONS)]
    try:
        for client in silent[::2]:
            client.send(b"GET /metrics HTTP/1.0\r\nX-Slow: ")
        assert get(server, "/healthz") == (200, "ok\n")
        wait_until_threads(before + MAX_CONNECTIONS)
        silent[0].settimeout(10)
        assert silent[0].recv(1) == b""  # the oldest gave way
    finally:
        for client in silent:
            client.close()
    wait_until_threads(before)
    assert get(server, "/healthz") == (200, "ok\n")


def test_a_closed_server_leaves_no_thread_or_socket(health: Health) -> None:
    before, open_before = threads(), len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    server = served.serve("127.0.0.1:0", cast(Metrics, BrokenMetrics()), health)
    address = server.address
    with socket.create_connection(address) as silent:
        assert get(server, "/healthz")[0] == 200
        server.close()
        silent.settimeout(10)
        assert silent.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    wait_until_threads(before)
    assert len(os.listdir("/proc/self/fd")) == open_before  # noqa: PTH208


def wake_ups() -> int:
    """How often the server's thread has slept and been woken."""
    (thread,) = (each for each in threading.enumerate() if each.name == "http")
    status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
    return int(status.partition("voluntary_ctxt_switches:")[2].split()[0])


def test_idle_it_never_wakes(server: Server) -> None:
    get(server, "/metrics")
    time.sleep(0.5)
    before = wake_ups()
    time.sleep(2)
    assert wake_ups() == before
    get(server, "/metrics")
    assert wake_ups() > before


def test_ipv6_and_all_addresses(health: Health) -> None:
    metrics = cast(Metrics, BrokenMetrics())
    with served.serve("[::1]:0", metrics, health) as server:
        assert server.address[0] == "::1"
        assert get(server, "/healthz")[0] == 200
    with served.serve(":0", metrics, health) as server:
        port = server.address[1]
        for host in ("127.0.0.1", "::1"):
            connection = http.client.HTTPConnection(host, port, timeout=10)
            connection.request("GET", "/healthz")
            assert connection.getresponse().status == 200
            connection.close()


def test_a_port_that_is_taken(server: Server, health: Health) -> None:
    host, port = server.address
    with pytest.raises(OSError, match="in use"):
        served.serve(f"{host}:{port}", cast(Metrics, BrokenMetrics()), health)


def test_addresses() -> None:
    assert parse_address("10.0.0.1:15099") == ("10.0.0.1", 15099)
    assert parse_address("[fd00::1]:15099") == ("fd00::1", 15099)
    assert parse_address("localhost:0") == ("localhost", 0)
    assert parse_address(":15099")[1] == 15099


@pytest.mark.parametrize(
    "text", ["", "host", "15099", "::1", "host:port", "host:70000", "a:1/x", "u@a:1", "http://a:1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="is no HOST:PORT"):
        parse_address(text)
