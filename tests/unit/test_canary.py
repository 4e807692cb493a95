# SPDX-License-Identifier: Apache-2.0
"""The joiner's canary: when sockets go back to TCP, and when they may join again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bpf import abi, pins
from cni_plugin.state import State
from install.program import canary, log
from install.program.canary import Canary
from install.program.generations import Generation

CONTROL, SOCKHASH, SPLICERS = 3, 4, 5


class Notes(dict[bytes, bytes]):
    """By the sockets' cookies."""

    def __missing__(self, key: bytes) -> bytes:
        raise FileNotFoundError(key)

    def __delitem__(self, key: bytes) -> None:
        if self.pop(key, None) is None:
            raise FileNotFoundError(key)


@dataclass(frozen=True)
class FakeSocket:
    cookie: bytes

    def getsockopt(self, *_option: int) -> bytes:
        return self.cookie


@dataclass
class Kernel:
    """What the canary sees of the kernel."""

    answer: int = abi.CANARY_ANSWER
    is_watched: bool = True
    flags: int = abi.CONTROL_PAUSED
    sockets: int = 2
    noted: Notes = field(default_factory=Notes)

    def map_lookup(self, fd: int, key: bytes, _size: int) -> bytes:
        if fd == SPLICERS:
            return self.noted[key]
        assert fd == CONTROL
        return bytes(abi.Control(self.flags, 0))

    def map_update(self, fd: int, _key: bytes, value: bytes) -> None:
        assert fd == CONTROL
        self.flags = abi.Control.from_buffer_copy(value).flags

    def map_delete(self, fd: int, key: bytes) -> None:
        assert fd == SPLICERS
        del self.noted[key]

    def splice(self, canary: FakeSocket) -> None:
        if self.is_watched:
            self.noted[canary.cookie] = b"one!"

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

    is_pinned: bool = True  # what the canary has opened, and not another load's

    def look(self) -> None:
        self.canary.look(State(str(self.folder.parent / "state")))

    def unpin(self, pin: str = pins.MENDS[0]) -> None:
        (self.folder / pin).unlink()

    @property
    def leaves(self) -> bool:
        return bool(self.kernel.flags & abi.CONTROL_LEAVE)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    folder = tmp_path / "gen-1"
    folder.mkdir()
    for pin in pins.TRACES:
        (folder / pin).touch()
    (tmp_path / pins.CURRENT).symlink_to(folder.name)
    kernel = Kernel()
    sockets: list[Any] = [FakeSocket(b"7"), FakeSocket(b"8")]
    traces = dict.fromkeys(pins.TRACES, -1)
    of = Canary(Generation(folder), 1, traces, CONTROL, SOCKHASH, SPLICERS, sockets)
    made = Node(folder, kernel, of)
    monkeypatch.setattr(Generation, "has_pinned", lambda *_: made.is_pinned)
    monkeypatch.setattr(canary, "splice", kernel.splice)
    monkeypatch.setattr(canary, "bpfsys", kernel)
    monkeypatch.setattr(canary, "unread_bytes", lambda _socket: kernel.answer)

    def said(event: str, *_text: str, **_about: object) -> None:
        made.events.append(event)

    for level in ("info", "error"):
        monkeypatch.setattr(log, level, said)
    return made


def test_while_all_is_well_nothing_is_written(node: Node) -> None:
    node.look()
    assert (node.kernel.flags, node.events) == (abi.CONTROL_PAUSED, [])


def test_a_mend_that_is_silenced_and_comes_back(node: Node) -> None:
    node.kernel.answer = 0
    node.look()
    assert not node.leaves  # once may be the kernel's: a thread is preempted in the program
    node.look()
    node.look()
    assert node.leaves
    assert not node.canary.is_well
    node.kernel.answer = abi.CANARY_ANSWER
    node.look()
    assert node.kernel.flags == abi.CONTROL_PAUSED
    assert node.events == ["mend_lost", "mend_recovered"]


def test_check_asks_as_the_joiner_does(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves all to the joiner."""
    closed: list[Canary] = []

    def close(each: Canary) -> None:
        closed.append(each)

    monkeypatch.setattr(Canary, "of", lambda _generation: node.canary)
    monkeypatch.setattr(Canary, "close", close)
    ask = canary.try_programs
    assert ask(node.canary.generation) == ""
    node.kernel.answer = 0
    assert ask(node.canary.generation) == "FIONREAD is mended no more"
    node.unpin()
    assert ask(node.canary.generation) == "pins are gone: mend_inet_ioctl"
    assert (node.leaves, node.events, len(closed)) == (False, [], 3)
    monkeypatch.undo()
    for pin in node.canary.generation.traces():
        node.unpin(pin)
    assert ask(node.canary.generation) == "pins are gone"


def test_a_watch_of_splice_that_is_silenced(node: Node) -> None:
    """Where FIONREAD needs no mend, too."""
    for pin in pins.MENDS:
        node.unpin(pin)
        del node.canary.traces[pin]
    node.kernel.answer = 0
    node.look()
    assert not node.leaves
    node.kernel.is_watched = False
    node.look()
    node.look()
    assert node.leaves
    node.kernel.is_watched = True
    node.look()
    assert node.events == ["mend_lost", "mend_recovered"]


@pytest.mark.parametrize("pin", pins.TRACES)
def test_pins_that_are_removed(node: Node, pin: str) -> None:
    node.unpin(pin)
    node.look()
    assert node.leaves
    assert node.events == ["mend_lost"]


def test_pins_of_a_later_load_are_not_its_own(node: Node) -> None:
    """Its bpffs was unmounted, and a load has made a generation of the same name."""
    node.is_pinned = False
    node.look()
    node.look()
    assert node.leaves
    assert node.events == ["mend_lost"]


def test_the_lock_is_held_or_does_without(node: Node) -> None:
    """A pause that is set at the same time must not be lost."""
    state = State(str(node.folder.parent / "state"))
    state.make()
    node.unpin()
    with state.locked(0):
        node.look()
    assert node.kernel.flags == abi.CONTROL_PAUSED | abi.CONTROL_LEAVE


def test_a_generation_that_is_being_removed(node: Node) -> None:
    node.kernel.sockets = 0
    node.unpin()
    node.look()
    assert (node.leaves, node.events) == (False, [])


def test_one_that_is_current_no_more_stays_retired(node: Node) -> None:
    node.kernel.answer = 0
    node.look()
    node.look()
    (node.folder.parent / pins.CURRENT).unlink()
    node.kernel.answer = abi.CANARY_ANSWER
    node.look()
    assert node.leaves


def test_a_generation_without_such_programs_needs_none(tmp_path: Path) -> None:
    assert Canary.of(Generation(tmp_path)) is None
