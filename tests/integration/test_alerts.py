# SPDX-License-Identifier: Apache-2.0
"""Alerts fire on faults that are really made on a node, on theirs and on no other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bpf import bpfsys
from cni_plugin import names
from install.program import report, whole_file
from install.program.agent import agent as of_agent
from install.program.agent.agent import Agent, Settings
from install.program.agent.http import Health
from install.program.agent.metrics import Metrics
from install.program.host import OWN_PROC
from install.program.installer import Places, entry
from install.program.node import Node
from tests.bed import Pod, cgroups, open_bed, promtool
from tests.bed.bed import Bed
from tests.bed.promtool import Scrapes
from tests.integration import plugin_calls
from tests.integration.traffic_pods import eventually
from tests.manifests import render
from tests.unit.test_check import PLUGIN, plugin

ACCELERATED = {names.ENABLED: "true"}
LONG = 13 * 60  # minutes; longer than any alert waits
CONFLIST = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}]}


@pytest.fixture
def bed() -> Iterator[Bed]:
    with open_bed() as made:
        yield made


@pytest.fixture
def pod(bed: Bed) -> Iterator[Pod]:
    with bed.pod("talker", interception=None, annotations=ACCELERATED) as made:
        yield made


@pytest.fixture
def metrics(bed: Bed, pod: Pod) -> Metrics:  # noqa: ARG001 - it is what they tell of
    node = Node(bed.node.bpffs, bed.node.state_dir)
    assert eventually(lambda: not report.facts(node).joining_problem)  # its joiner starts
    return Metrics(node)


def firing(metrics: Metrics) -> set[str]:
    """What fires once the node has been so for long; that a kernel is unfit is no fault of ours."""
    return fired_by([Scrapes(LONG, metrics.render().decode())])


def fired_by(history: list[Scrapes]) -> set[str]:
    return promtool.firing(render.RULES, history) - {"TcpipBypassKernelUnfit"}


def test_paused(bed: Bed, metrics: Metrics) -> None:
    assert firing(metrics) == set()
    bed.node.call("pause")
    assert firing(metrics) == {"TcpipBypassPaused"}
    bed.node.call("resume")
    assert firing(metrics) == set()


def test_unloaded(bed: Bed, metrics: Metrics) -> None:
    bed.node.call("unload")
    assert firing(metrics) == {"TcpipBypassNotLoaded"}
    bed.node.load()
    assert eventually(lambda: firing(metrics) == set())  # the joiner looks once a second


def test_a_generation_whose_sockets_must_leave(bed: Bed, metrics: Metrics) -> None:
    """As the canary does when a program on a function of the kernel does not run."""
    current = Node(bed.node.bpffs, bed.node.state_dir).generations.current()
    assert current
    current.set_retired(True)
    assert firing(metrics) == {"TcpipBypassNotJoining"}
    current.set_retired(False)
    assert firing(metrics) == set()


def test_an_attachment_that_is_lost(pod: Pod, metrics: Metrics) -> None:
    with bpfsys.closing(os.open(pod.cgroup, os.O_RDONLY | os.O_DIRECTORY)) as cgroup:
        for program_id in bpfsys.prog_query(cgroup):
            with bpfsys.closing(bpfsys.prog_open(program_id)) as program:
                bpfsys.prog_detach(program, cgroup)
    assert firing(metrics) == {"TcpipBypassPodsLeftOut"}


def test_a_pod_that_could_not_be_accelerated(bed: Bed, metrics: Metrics) -> None:
    with plugin_calls.sandbox(bed, "lost") as sandbox:
        nowhere = cgroups.mount_point() / "no-such-cgroup"
        elsewhere = replace(sandbox, uid="no-such-uid", cgroup=nowhere)
        elsewhere.call("ADD")
        assert firing(metrics) == {"TcpipBypassPodsLeftOut"}
        elsewhere.call("DEL")
    assert firing(metrics) == set()


@dataclass
class Keeping:
    """The agent's own keeper of plugin and conflist, on folders of a test; seconds pass at once."""

    agent: Agent
    metrics: Metrics
    conflist: Path
    now: float = 0.0

    def minute(self, rewrites: int = 0) -> Scrapes:
        """The agent takes a minute's turns. In the first ones another program writes its file."""
        for second in range(60):
            if second < rewrites:
                whole_file.write(self.conflist, json.dumps(CONFLIST))
            self.now += 1
            self.agent._notice()  # inotify's events are real
            self.agent._do(self.agent._files)
            self.agent._watch.watch(self.agent._folders())
        return Scrapes(1, self.metrics.render().decode())

    @property
    def is_in(self) -> bool:
        return names.PLUGIN in self.conflist.read_text()


@pytest.fixture
def keeping(metrics: Metrics, bed: Bed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keeping:
    conf_dir, source = tmp_path / "net.d", tmp_path / "plugin"
    conf_dir.mkdir()
    plugin(source, PLUGIN)
    node = Node(bed.node.bpffs, bed.node.state_dir)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/bridge").touch()
    places = Places(conf_dir, tmp_path / "bin", source, OWN_PROC)
    ours = entry(node.bpffs, node.state_dir, None)
    settings = Settings(places, ours, [], [], [], (), None, None, once=False)
    made = Keeping(Agent(node, settings, metrics, Health()), metrics, conf_dir / "10-pods.conflist")
    monkeypatch.setattr(of_agent, "time", SimpleNamespace(monotonic=lambda: made.now))
    whole_file.write(made.conflist, json.dumps(CONFLIST))
    return made


def test_a_conflist_that_is_fought_over(keeping: Keeping) -> None:
    calm = [keeping.minute() for _ in range(30)]
    assert keeping.is_in
    fought = [keeping.minute(rewrites=60) for _ in range(40)]
    assert fired_by([*calm, *fought]) == {"TcpipBypassConflistFoughtOver"}
    over = [keeping.minute() for _ in range(30)]
    assert keeping.is_in
    assert fired_by([*calm, *fought, *over]) == set()


def test_a_conflist_that_another_program_writes_now_and_then(keeping: Keeping) -> None:
    found = [keeping.minute(rewrites=number % 5 // 4) for number in range(60)]
    assert keeping.is_in
    assert fired_by(found) == set()
