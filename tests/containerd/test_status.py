# SPDX-License-Identifier: Apache-2.0
"""A runtime that asks STATUS has a network, and starts pods, whatever we are short of.

containerd 2 asks the plugins of a CNI 1.1 list for STATUS whenever it is asked for its own, which
kubelet does every few seconds. One that fails makes the node NotReady.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from cni_plugin import names
from tests.containerd import releases
from tests.containerd.agent import Agent
from tests.containerd.bed import PLAIN, RuntimeBed, open_bare_bed
from tests.containerd.cri import CriError

SECONDS = 3  # in each state that stays as it is
WENT_WELL = "started and ended"
OFF = {"mode": "off", "reasons": ["this is a test"]}


@dataclass(frozen=True)
class Second:
    """What kubelet would have seen in one second."""

    state: str
    has_network: bool
    pod: str  # how one fared: WENT_WELL, or the runtime's error


@pytest.fixture
def agent() -> Iterator[Agent]:
    """A node as after a reboot: the plugin and its entry are there, and nothing else of ours."""
    with open_bare_bed(releases.get("2")) as bed:
        agent = Agent(bed, options=("--conf-json", "{}"))  # the mode is the self-test's
        install(agent)
        try:
            yield agent
        finally:
            agent.kill()
        bed.end_all_sandboxes()
        agent.run("uninstall", "--purge", *agent.places())
        left = bed.leftovers()
        assert not any(left.values()), left


def test_the_network_stays_ready(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    bed = agent.bed
    seen = watched(bed, "nothing loaded")

    bed.state_dir.symlink_to(bed.state_dir.name)
    seen += watched(bed, "state folder unreadable")
    bed.state_dir.unlink()

    install(agent, mode="off")
    seen += watched(bed, "mode off")

    install(agent)
    agent.start()
    seen += watched(bed, "agent starting", lambda: agent.reasons() == [])

    node_json = bed.state_dir / names.NODE_JSON
    node_json.write_text(json.dumps(json.loads(node_json.read_text()) | OFF))
    seen += watched(bed, "self-test says off")
    answers = agent.get("/readyz"), agent.get("/metrics")[1], agent.run("status")
    with capsys.disabled():
        print("\n\n" + table(seen))

    assert [each for each in seen if not each.has_network or each.pod != WENT_WELL] == []
    said = {line for line in bed.containerd.log().splitlines() if ": STATUS: " in line}
    for missing in (
        "the programs are not loaded",
        "Too many levels of symbolic links",
        "mode is off: this is a test",
    ):
        assert any(missing in line for line in said), (missing, said)
    readiness, metrics, status = answers
    assert readiness == (200, "ok\nmode is off: this is a test\n")
    assert 'tcpip_bypass_mode{mode="off"} 1.0' in metrics
    assert "mode off: this is a test" in status


def install(agent: Agent, **options: str) -> None:
    """The plugin, and its entry with these options."""
    agent.run("install", *agent.places(), "--conf-json", json.dumps(options))


def watched(
    bed: RuntimeBed, state: str, has_ended: Callable[[], bool] = lambda: True
) -> list[Second]:
    """Second by second, until the state has ended."""
    seen: list[Second] = []
    while len(seen) < SECONDS or not has_ended():
        began = time.monotonic()
        has_network = bed.cri.conditions()["NetworkReady"]
        seen.append(Second(state, has_network, life(bed, f"{state.replace(' ', '-')}-{len(seen)}")))
        time.sleep(max(0.0, began + 1 - time.monotonic()))
    return seen


def life(bed: RuntimeBed, name: str) -> str:
    """What became of one pod of the mesh."""
    with bed.pod(name, handler=PLAIN) as pod:
        try:
            pod.end_sandbox(pod.run_sandbox())
        except CriError as error:
            return str(error)
    return WENT_WELL


def table(seen: list[Second]) -> str:
    rows = [f"{'second':>6}  {'network':<10}{'state':<26}pod"]
    for number, each in enumerate(seen, 1):
        network = "ready" if each.has_network else "NOT READY"
        rows.append(f"{number:>6}  {network:<10}{each.state:<26}{each.pod}")
    return "\n".join(rows)
