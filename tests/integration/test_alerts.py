# SPDX-License-Identifier: Apache-2.0
"""Alerts fire on faults that are really made on a node, on theirs and on no other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from bpf import bpfsys
from cni_plugin import names
from install.program.agent.metrics import Metrics
from install.program.node import Node
from tests.bed import Pod, cgroups, open_bed, promtool
from tests.bed.bed import Bed
from tests.bed.promtool import Scrapes
from tests.integration import plugin_calls
from tests.manifests import render

ACCELERATED = {names.ENABLED: "true"}
LONG = 13 * 60  # minutes; longer than any alert waits


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
    return Metrics(Node(bed.node.bpffs, bed.node.state_dir))


def firing(metrics: Metrics) -> set[str]:
    """What fires once the node has been so for long; that a kernel is unfit is no fault of ours."""
    fired = promtool.firing(render.RULES, [Scrapes(LONG, metrics.render().decode())])
    return fired - {"TcpipBypassKernelUnfit"}


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
