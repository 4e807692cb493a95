# SPDX-License-Identifier: Apache-2.0
"""The joiner's canary: when sockets go back to TCP, and when they may join again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bpf import abi, pins
from install.program import canary, log
from install.program.canary import Canary
from install.program.generations import Generation

CONTROL, SOCKHASH = 3, 4


@dataclass
class Kernel:
    """What the canary sees of the kernel."""

    answer: int = abi.CANARY_ANSWER
    flags: int = abi.CONTROL_PAUSED
    sockets: int = 2

    def map_lookup(self, fd: int, _key: bytes, _size: int) -> bytes:
        assert fd == CONTROL
        return bytes(abi.Control(self.flags, 0))

    def map_update(self, fd: int, _key: bytes, value: bytes) -> None:
        assert fd == CONTROL
        self.flags = abi.Control.from_buffer_copy(value).flags

    def map_is_empty(self, fd: int) -> bool:
        assert fd == SOCKHASH
        return not self.sockets


@dataclass
class Node:
    """A node with one generation, and its canary."""

    folder: Path
    kernel: Kernel
    canary: Canary
    events: list[str] = field(default_factory=list)

    def unpin(self) -> None:
        (self.folder / pins.MENDS[0]).unlink()

    @property
    def leaves(self) -> bool:
        return bool(self.kernel.flags & abi.CONTROL_LEAVE)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    folder = tmp_path / "gen-1"
    folder.mkdir()
    for pin in pins.MENDS:
        (folder / pin).touch()
    (tmp_path / pins.CURRENT).symlink_to(folder.name)
    kernel = Kernel()
    sockets: list[Any] = [None, None]
    made = Node(folder, kernel, Canary(Generation(folder), 1, [], CONTROL, SOCKHASH, sockets))
    monkeypatch.setattr(canary, "bpfsys", kernel)
    monkeypatch.setattr(canary, "unread_bytes", lambda _socket: kernel.answer)

    def said(event: str, *_text: str, **_about: object) -> None:
        made.events.append(event)

    for level in ("info", "error"):
        monkeypatch.setattr(log, level, said)
    return made


def test_while_all_is_well_nothing_is_written(node: Node) -> None:
    node.canary.look()
    assert (node.kernel.flags, node.events) == (abi.CONTROL_PAUSED, [])


def test_a_mend_that_is_silenced_and_comes_back(node: Node) -> None:
    node.kernel.answer = 0
    node.canary.look()
    node.canary.look()
    assert node.leaves
    assert not node.canary.is_well
    node.kernel.answer = abi.CANARY_ANSWER
    node.canary.look()
    assert node.kernel.flags == abi.CONTROL_PAUSED
    assert node.events == ["mend_lost", "mend_recovered"]


def test_check_asks_as_the_joiner_does(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves all to the joiner."""
    closed: list[Canary] = []

    def close(each: Canary) -> None:
        closed.append(each)

    monkeypatch.setattr(Canary, "of", lambda _generation: node.canary)
    monkeypatch.setattr(Canary, "close", close)
    ask = canary.why_not_mended
    assert ask(node.canary.generation) == ""
    node.kernel.answer = 0
    assert ask(node.canary.generation) == "it does not answer any more"
    node.unpin()
    assert ask(node.canary.generation) == "its pins are gone"
    assert (node.leaves, node.events, len(closed)) == (False, [], 3)
    monkeypatch.undo()
    assert ask(node.canary.generation) == "its pins are gone"


def test_pins_that_are_removed(node: Node) -> None:
    node.unpin()
    node.canary.look()
    assert node.leaves
    assert node.events == ["mend_lost"]


def test_a_generation_that_is_being_removed(node: Node) -> None:
    node.kernel.sockets = 0
    node.unpin()
    node.canary.look()
    assert (node.leaves, node.events) == (False, [])


def test_one_that_is_current_no_more_stays_retired(node: Node) -> None:
    node.kernel.answer = 0
    node.canary.look()
    (node.folder.parent / pins.CURRENT).unlink()
    node.kernel.answer = abi.CANARY_ANSWER
    node.canary.look()
    assert node.leaves


def test_a_generation_without_the_mend_needs_none(tmp_path: Path) -> None:
    assert Canary.of(Generation(tmp_path)) is None
