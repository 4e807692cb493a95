# SPDX-License-Identifier: Apache-2.0
"""`compare`: the order of phases, the ratio, and that a node is never left paused."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpf import abi
from install.program import commands, compare, report
from install.program.compare import Comparison, Phase
from install.program.node import Node, NodeError
from install.program.report import Facts
from install.program.switch import Kept, Switch
from tests.unit.test_check import WELL


def phase(*, paused: bool, cpu_s: float = 1.0, size: int = 1_000_000) -> Phase:
    return Phase(paused, 2.0, cpu_s, 0 if paused else size, size if paused else 0)


class Meter:
    """Stands for a node whose bypass takes 0.6 of the CPU, under a load that grows."""

    pods = 2

    def __init__(self) -> None:
        self.asked: list[bool] = []

    def phase(self, seconds: float, *, paused: bool) -> Phase:
        assert seconds == 1.0
        self.asked.append(paused)
        load = len(self.asked)
        return phase(paused=paused, cpu_s=load * (1.0 if paused else 0.6), size=load * 10**6)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SETTLE_S", 0.0)


def test_phases_come_in_pairs_each_way_round() -> None:
    meter: Any = Meter()
    switched: list[bool] = []
    found = compare.measure(meter, switched.append, 1.0)
    assert switched == meter.asked
    assert switched[:4] == [True, False, False, True]
    assert len(found.pairs) == compare.PAIRS
    assert all(off.paused and not on.paused for off, on in found.pairs)
    assert found.cpu_per_byte.middle == pytest.approx(0.6)
    assert found.cpu_per_byte.high < 1
    text = "\n".join(compare.lines(found))
    assert "bypass to paused: 0.600" in text
    assert "No difference" not in text
    assert compare.as_json(found)["cpu_per_byte"]["middle"] == pytest.approx(0.6)


def test_what_is_not_shown_is_not_said() -> None:
    pairs = [
        (phase(paused=True, cpu_s=off), phase(paused=False, cpu_s=on))
        for off, on in ((1.0, 0.8), (1.0, 1.3), (1.0, 0.9), (1.0, 1.1))
    ]
    assert "No difference is shown" in "\n".join(compare.lines(Comparison(2, pairs)))


class Generation:
    folder = Path("/no")

    def __init__(self) -> None:
        self.said: list[bool] = []
        self.now = 0

    def flags(self) -> int:
        return self.now

    def paused_pods(self) -> set[int]:
        return set()

    def set_paused(self, paused: bool, *, is_trial: bool = False) -> None:
        self.said.append(paused)
        self.now = paused * (abi.CONTROL_PAUSED | is_trial * abi.CONTROL_TRIAL)


class FakeNode(Node):
    """A node with one generation and no kernel."""

    generation = Generation()

    @property
    def generations(self) -> Any:
        class All:
            def complete(self) -> list[Generation]:
                return [FakeNode.generation]

            def current(self) -> Generation:
                return FakeNode.generation

        return All()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        yield


@pytest.fixture
def node() -> FakeNode:
    FakeNode.generation = Generation()
    return FakeNode(Path("/no"), Path("/no"))


def paused_until(node: FakeNode, fault: Callable[[], None]) -> None:
    with compare.pausing(node) as set_paused:
        set_paused(True)
        fault()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_resumes(node: FakeNode, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(NodeError, match=f"{number.name} came; its own pause has ended"):
        paused_until(node, lambda: os.kill(os.getpid(), number))
    assert node.generation.said == [True, False]
    assert signal.getsignal(number) == before


def test_anothers_pause_stays(node: FakeNode) -> None:
    """An operator's, or that of the cluster's switch, between two phases."""

    def compared() -> None:
        with compare.pausing(node) as set_paused:
            set_paused(True)
            set_paused(False)
            node.generation.set_paused(True)
            set_paused(True)

    with pytest.raises(NodeError, match="paused or resumed meanwhile"):
        compared()
    assert node.generation.said == [True, False, True]


def operator_pauses(node: FakeNode) -> None:
    commands.pause(node)
    os.kill(os.getpid(), signal.SIGTERM)


def test_an_operators_pause_while_it_is_paused_stays(node: FakeNode) -> None:
    with pytest.raises(NodeError, match="SIGTERM came"):
        paused_until(node, lambda: operator_pauses(node))
    assert node.generation.flags() == abi.CONTROL_PAUSED


def test_a_fault_resumes(node: FakeNode) -> None:
    with pytest.raises(ZeroDivisionError):
        paused_until(node, lambda: print(1 // 0))
    assert node.generation.said == [True, False]


@pytest.mark.parametrize(
    ("facts", "first"),
    [
        (replace(WELL, paused=True), "first tcpip-bypass-node resume"),
        (replace(WELL, paused_pods=frozenset({1})), "first tcpip-bypass-node resume"),
        (replace(WELL, paused_pods=frozenset({7})), "first tcpip-bypass-node resume"),  # has ended
        (replace(WELL, paused=True, switch=Kept(Switch(paused=True), True)), "first edit the Conf"),
        (
            replace(WELL, paused_pods=frozenset({1}), switch=Kept(held_pods=frozenset({1}))),
            "first edit the ConfigMap",
        ),
    ],
)
def test_a_node_that_is_paused_is_not_compared(
    monkeypatch: pytest.MonkeyPatch, facts: Facts, first: str
) -> None:
    monkeypatch.setattr(report, "facts", lambda _node: facts)
    with pytest.raises(NodeError) as raised:
        compare._accelerated(Node(Path("/no/bpffs"), Path("/no/state")))
    assert str(raised.value).partition("; ")[2].startswith(first)
