"""A thousand receivers that do not read at once take no more of the node than over TCP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import light

PROGRAM = Path(__file__).with_name("traffic_stalled.py")
CONNECTIONS = 1000


def run(cgroup: Path | None) -> dict[str, Any]:
    """The program's report, from within an accelerated cgroup or from outside."""
    enter = f"echo $$ > {cgroup}/cgroup.procs && " if cgroup else ""
    command = f'{enter}exec "$0" "$@"'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, PROGRAM, str(CONNECTIONS)],
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_thousand_stalled_receivers() -> None:
    plain = run(None)
    with light.accelerated() as pod:
        bypassed = run(pod.folder)
        counters = pod.total()
    print(f"plain TCP {plain}\nbypass    {bypassed}\n{counters}")
    assert counters.connections["paired"] == 2 * (CONNECTIONS + 2)
    assert counters.bypassed_bytes > 0
    assert bypassed["errors"] == plain["errors"] == []
    assert bypassed["others work"] == plain["others work"] == [True, True]
    # TCP's memory is one count for the machine: what else runs there moves it a little.
    assert bypassed["pages"] <= 1.1 * plain["pages"]
    assert bypassed["queued"] <= 2 * plain["queued"]
