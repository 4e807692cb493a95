# SPDX-License-Identifier: Apache-2.0
"""Mosquitto: retained messages of up to 2 MB, a stream of small ones to two subscribers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.apps.application import Application, Figures
from tests.apps.place import TWO_HOPS, Link, Place
from tests.apps.programs.contract import compare, pattern
from tests.apps.tools import PATIENCE_S

RETAINED = (1, 65_537, 2_000_000)
MESSAGES = 10_000
SUBSCRIBERS = 2
READY = "ready"


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """A broker without passwords."""
    link = place.front
    config = link.server.folder("mosquitto") / "mosquitto.conf"
    lines = [f"listener {link.listen_port} 0.0.0.0", "allow_anonymous true", "set_tcp_nodelay true"]
    config.write_text("\n".join([*lines, "max_queued_messages 0", "max_inflight_messages 100", ""]))
    config.chmod(0o644)
    with link.serving(["mosquitto", "-c", config]):
        yield


def _options(link: Link) -> str:
    """Of both clients: without TCP_NODELAY a client that does not wait for answers stays on TCP."""
    return f"-h {link.destination} -p {link.port} --nodelay"


def _run(link: Link, command: str) -> str:
    return link.client.run(["sh", "-c", command], timeout_s=PATIENCE_S)


def _file(link: Link, name: str, content: bytes) -> Path:
    path = link.client.folder("mosquitto") / name
    path.write_bytes(content)
    link.client.give(path)
    return path


def check(place: Place) -> None:
    """What is published is what all subscribers get, in order."""
    link = place.front
    for size in RETAINED:
        path = _file(link, "retained", pattern(size))
        _run(link, f"mosquitto_pub {_options(link)} -r -q 1 -t large/{size} -f {path}")
        got = _run(link, f"mosquitto_sub {_options(link)} -C 1 -t large/{size} -F %x")
        compare(bytes.fromhex(got), pattern(size))
    _stream(place, MESSAGES)


def _stream(place: Place, count: int) -> float:
    """Seconds until all subscribers had so many messages."""
    link = place.front
    lines = [f"{number} {'m' * (number % 300)}" for number in range(count)]
    sent = _file(link, "sent", "".join(f"{line}\n" for line in lines).encode())
    _run(link, f"mosquitto_pub {_options(link)} -r -q 1 -t stream/a -m {READY}")
    got = [_file(link, f"got-{number}", b"") for number in range(SUBSCRIBERS)]
    subscribers = []
    for path in got:
        wait = f"-C {count + 1} -q 1 -t stream/#"
        command = f"exec mosquitto_sub {_options(link)} {wait} > {path}"
        subscribers.append(link.client.spawn(["sh", "-c", command]))
    deadline = time.monotonic() + PATIENCE_S
    while any(READY not in path.read_text() for path in got):
        assert time.monotonic() < deadline, "a subscriber got no retained message"
        time.sleep(0.01)
    start = time.monotonic()
    _run(link, f"mosquitto_pub {_options(link)} -q 1 -t stream/b -l < {sent}")
    for process, path in zip(subscribers, got):
        assert process.wait(timeout=PATIENCE_S) == 0
        assert path.read_text().splitlines() == [READY, *lines], path.read_text()[-500:]
    return time.monotonic() - start


def load(place: Place, seconds: float) -> Figures:
    """Messages of 150 bytes on average, one way, to two subscribers."""
    count = max(MESSAGES, round(MESSAGES / _stream(place, MESSAGES) * seconds))
    return Figures(count, _stream(place, count), None, None)


APPLICATIONS = (
    Application(
        "mosquitto",
        "Mosquitto, two subscribers",
        reader="event loop",
        protocol="tcp",
        serve=serve,
        check=check,
        loads={"QoS 1": load},
        hops=TWO_HOPS,
    ),
)
