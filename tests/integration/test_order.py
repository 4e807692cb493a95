# SPDX-License-Identifier: Apache-2.0
"""Connections whose first bytes cannot but go by TCP, a thousand of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests import light

REPOSITORY = Path(__file__).parents[2]
CONNECTIONS = 1000
PROGRAM = f"""
import json, pathlib, sys
from install import probes
probes.enter(pathlib.Path(sys.argv[1]))
probes.ORDER_CONNECTIONS = {CONNECTIONS}
json.dump(probes.order(), sys.stdout)
"""


def test_pipelined_writes_to_a_listener_with_deferred_accept() -> None:
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
    assert json.loads(done.stdout) == {"corrupted connections": 0}
    assert counters.connections["paired"] >= 1.9 * CONNECTIONS
    # The rule was what held them back: a version without it corrupts (tests/fuzz/test_mutants.py).
    assert counters.tcp_messages["order"] >= 8 * CONNECTIONS
