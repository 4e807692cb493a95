# SPDX-License-Identifier: Apache-2.0
"""`pause` names the pods that have not come to an empty moment, and no others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from bpf.stats import HopCounters
from cni_plugin.state import Attachment
from install.program import commands, pauses, report
from install.program.node import Node
from tests.unit.test_attachment import BLANK

# Bypassed bytes at each look: still there, closed a connection in between, idle.
LOOKS = {1: (10, 20, 30), 2: (10, 20, 20), 3: (10, 10, 10)}


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Node:
    looks = iter(range(3))

    def counters(_generations: object, pod_ids: Iterable[int]) -> report.Reading:
        look = next(looks)
        return {
            (7, each): {"outbound": HopCounters(bypassed_bytes=LOOKS[each][look])}
            for each in pod_ids
        }

    def attachments(_node: Node) -> list[Attachment]:
        return [
            BLANK._replace(pod_id=each, pod_namespace="shop", pod_name=f"cart-{each}")
            for each in LOOKS
        ]

    monkeypatch.setattr(report, "counters", counters)
    monkeypatch.setattr(pauses, "apply", lambda _node, _change: 1)
    monkeypatch.setattr(commands, "LOOK_S", 0)
    monkeypatch.setattr(Node, "attachments", attachments)
    return Node(tmp_path / "bpffs", tmp_path / "state")


def test_the_node(node: Node, capfd: pytest.CaptureFixture[str]) -> None:
    commands.pause(node)
    said = capfd.readouterr().err
    assert said.startswith("warning: shop/cart-1 still bypasses: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("pod", "is_named"), [(1, True), (2, False), (3, False)])
def test_one_pod(
    node: Node, capfd: pytest.CaptureFixture[str], pod: int, *, is_named: bool
) -> None:
    """Another one that goes on is not the operator's concern."""
    commands.pause(node, f"shop/cart-{pod}")
    assert (f"shop/cart-{pod} still bypasses" in capfd.readouterr().err) is is_named


def test_a_state_folder_that_cannot_be_read(
    node: Node, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(_node: Node) -> list[Attachment]:
        raise PermissionError("no")

    monkeypatch.setattr(Node, "attachments", refused)
    commands.pause(node)
    assert "which pods still bypass cannot be read" in capfd.readouterr().err
