# SPDX-License-Identifier: Apache-2.0
"""`compare` on a node with a load, and on nodes where there is nothing to compare."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from install.program.estimate import figures
from tests.bed import ends, open_bed, pairs, pingpong
from tests.bed.bed import Bed
from tests.bed.node import PROGRAM

ACCELERATED = {"tcpip-bypass/enabled": "true"}
SECONDS = 30
ROUNDS = 20_000_000  # more than a comparison can see
# An event loop at both ends, so that every kernel and edition lets it bypass.
PINGPONG = """
import select, socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
poll = select.epoll()
for each in (client, server):
    each.setblocking(False)
    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    poll.register(each, select.EPOLLIN)
ends = {client.fileno(): client, server.fileno(): server}
client.send(b"x" * 16384)
while True:
    for fd, _ in poll.poll():
        ends[fd].send(ends[fd].recv(65536))
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with open_bed() as made:
        yield made


def compare(bed: Bed, *options: str) -> subprocess.CompletedProcess[str]:
    argv: list[str | Path] = [PROGRAM, "compare", *options]
    argv += ["--bpffs", bed.node.bpffs, "--state-dir", bed.node.state_dir]
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)


def test_a_load_that_bypasses_takes_less_cpu(bed: Bed) -> None:
    with bed.pod("talker", interception=None, annotations=ACCELERATED) as pod:
        pod.spawn(["/usr/bin/python3", "-c", PINGPONG])
        done = compare(bed, "--seconds", str(SECONDS), "--json")
        assert done.returncode == 0, done.stderr
        assert bed.node.status()["paused"] is False
    found = json.loads(done.stdout)
    assert found["pods"] == 1
    assert_switched(found)
    assert found["cpu_per_byte"]["middle"] < 1, found


def assert_switched(found: dict[str, Any]) -> None:
    """All bytes by TCP while it was paused, and by the bypass otherwise."""
    for phase in found["phases"]:
        share = phase["bypassed_bytes"] / (phase["bypassed_bytes"] + phase["tcp_bytes"])
        assert share < 0.01 if phase["paused"] else share > 0.99, found


def test_it_finds_what_the_benchmark_has_found(bed: Bed) -> None:
    """Round trips of 64 bytes between sidecars on one CPU: the saving has its sign and order."""
    cpu = str(max(os.sched_getaffinity(0)))
    program = ends.compiled(pingpong.SOURCE, bed.folder)
    with pairs.pair(bed, "bypass") as pair:
        hop = pingpong.hop("sidecars", pair.client, pair.server)
        asked: list[str | Path] = [program, "ask", hop.source, hop.destination, str(hop.port)]
        load = ["64", "events", "0", "0", str(ROUNDS)]
        with pingpong.serving(program, hop, cpu):
            asking = hop.asker.spawn([*asked, *load], container=hop.asker_container, cpus=cpu)
            done = compare(bed, "--seconds", str(SECONDS), "--json")
            assert asking.poll() is None, pair.client.logs()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert_switched(found)
    benchmark = figures.of("sidecars")
    saved, expected = 1 - found["cpu_per_byte"]["middle"], benchmark.saved_us / benchmark.tcp_us
    assert expected / 2 < saved < expected * 3 / 2, found


def test_where_there_is_nothing_to_compare(bed: Bed) -> None:
    assert "no pod is accelerated" in compare(bed).stderr
    assert "--seconds must be at least" in compare(bed, "--seconds", "5").stderr
    with bed.pod("quiet", interception=None, annotations=ACCELERATED):
        done = compare(bed, "--seconds", "24")
        assert (done.returncode, "have sent nothing" in done.stderr) == (1, True)
        assert bed.node.status()["paused"] is False
        bed.node.call("pause")
        assert "first tcpip-bypass-node resume" in compare(bed).stderr
        bed.node.call("resume")
