# SPDX-License-Identifier: Apache-2.0
"""The bed's own end, when nobody can wait for it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bed import sweep
from tests.bed.bed import REPOSITORY
from tests.containerd import node

ABANDONED = """
import signal
from tests.containerd.bed import open_bed
with open_bed() as bed, bed.pod("abandoned") as pod:
    pod.run_sandbox()
    print(bed.node.name, flush=True)
    signal.pause()
"""


def traces(name: str) -> list[str]:
    """Everything on the machine that carries a run's name."""
    found = [what for kind in sweep.leftovers(name).values() for what in kind]
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return found + [f"{mount}/{name}" for mount in mounts if Path(mount, name).exists()]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_broken_off_leaves_nothing(how: signal.Signals) -> None:
    argv = [sys.executable, "-c", ABANDONED]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as run:
        assert run.stdout is not None
        name = run.stdout.readline().strip()
        assert name
        assert traces(name)
        run.send_signal(how)
    if how is signal.SIGKILL:
        node.remove_dead_runs()  # as the next run does
    assert traces(name) == []
