# SPDX-License-Identifier: Apache-2.0
"""A thousand receivers that do not read take little more of the node than over TCP.

Their buffers are such that the node's memory for TCP (net.ipv4.tcp_mem) is not used up: beyond
that, a socket in a sockhash waits in send where TCP lets one segment through (docs/limits.md).
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import light
from tests.fuzz.switch import RCVBUF

REPOSITORY = Path(__file__).parents[2]
CONNECTIONS = 1000
PAGE = resource.getpagesize()
SNDBUF = 524_288  # the most that it may grow to


def run(cgroup: Path | None) -> dict[str, Any]:
    """The program's report, from within an accelerated cgroup or from outside."""
    place = [cgroup] if cgroup else []
    done = subprocess.run(
        [sys.executable, "-m", "tests.integration.traffic_stalled", str(CONNECTIONS), *place],
        cwd=REPOSITORY,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_many_stalled_receivers() -> None:
    plain = run(None)
    with light.accelerated() as pod:
        bypassed = run(pod.folder)
        counters = pod.total()
    print(f"plain TCP {plain}\nbypass    {bypassed}\n{counters}")
    assert counters.connections["paired"] == 2 * (CONNECTIONS + 2)
    assert counters.bypassed_bytes > 0
    assert bypassed["errors"] == plain["errors"] == []
    assert bypassed["others work"] == plain["others work"] == [True, True]
    # Each may hold its receive buffer and a quarter of its send buffer on top of what TCP takes.
    extra = CONNECTIONS * (RCVBUF + SNDBUF // 4)
    assert bypassed["pages"] - plain["pages"] <= 1.1 * extra / PAGE
    assert bypassed["queued"] - plain["queued"] <= 1.1 * extra
