# SPDX-License-Identifier: Apache-2.0
"""Order: connections that join while bytes of TCP lie unread, hundreds of them; and readers that
peek until enough is there, as a sidecar's listener filters do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import light
from tests.bed import APP_UID, PROXY_UID

REPOSITORY = Path(__file__).parents[2]
CONNECTIONS = 300
MESSAGES = 20
ACQUAINTANCE = 12  # exchanges after which both ends may join
PROGRAM = f"""
import json, pathlib, sys, time
from install.program import probes
probes.enter(pathlib.Path(sys.argv[1]))
sent, corrupted = bytes(range({MESSAGES})), 0
for _ in range({CONNECTIONS}):
    with probes.connected(greet=False) as (client, server):
        for _ in range({ACQUAINTANCE}):
            client.sendall(b"?")
            server.recv(1)
            server.sendall(b"!")
            client.recv(1)
        for number in sent:  # in the midst of these they join
            client.sendall(bytes([number]))
            time.sleep(0.001)
        received = server.recv(1)
        client.sendall(b"the last")
        client.close()
        corrupted += received + probes.read_to_end(server) != sent + b"the last"
json.dump(corrupted, sys.stdout)
"""
PEEKER = """
import os, pathlib, socket, sys, time
from install.program import probes
probes.enter(pathlib.Path(sys.argv[1]))
os.setuid(int(sys.argv[2]))
size, total, taken = map(int, sys.argv[3:])
with probes.connected(greet=taken) as (client, server):
    for _ in range(total // size):
        client.sendall(b"y" * size)
    end = time.monotonic() + 5
    seen = 0
    server.setblocking(False)
    while time.monotonic() < end and seen < total:
        try:
            seen = len(server.recv(2 * total, socket.MSG_PEEK))
        except BlockingIOError:
            pass
        time.sleep(0.01)
    print(seen)
"""


def test_pipelined_writes_around_the_join() -> None:
    with light.accelerated() as pod:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, pod.folder],
            check=True,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=300,
        )
        counters = pod.total()
    assert json.loads(done.stdout) == 0
    assert counters.connections == {"paired": 2 * CONNECTIONS}
    assert counters.joined >= CONNECTIONS  # of 2 each; a busy machine has few passes
    # The rule was what held them back: a version without it corrupts (tests/fuzz/test_mutants.py).
    assert counters.tcp_messages["order"] >= CONNECTIONS


def seen(uid: int, size: int, total: int, *, taken: bool) -> int:
    """How many of the bytes a peeker saw, that had taken some before or none."""
    with light.accelerated() as pod:
        arguments = [str(pod.folder), *map(str, (uid, size, total, int(taken)))]
        done = subprocess.run(
            [sys.executable, "-c", PEEKER, *arguments],
            check=True,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            timeout=60,
        )
    return int(done.stdout)


@pytest.mark.parametrize("uid", [APP_UID, PROXY_UID])
@pytest.mark.parametrize("size", [1, 7, 20])
def test_who_has_taken_nothing_sees_everything(uid: int, size: int) -> None:
    """A ClientHello in pieces; enough of them to pass the bound."""
    assert seen(uid, size, 2100 * size, taken=False) == 2100 * size


@pytest.mark.parametrize("uid", [APP_UID, PROXY_UID])
def test_who_has_taken_some_sees_what_the_bound_lets_pass(uid: int) -> None:
    assert seen(uid, 7, 700, taken=True) == 700
