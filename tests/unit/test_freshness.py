# SPDX-License-Identifier: Apache-2.0
"""When the agent loads the programs anew, and when it leaves them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bpf import pins
from bpf.loader import PINS, LoadError
from cni_plugin import names
from install.program import commands, freshness, log, selftest
from install.program.agent import bpffs
from install.program.agent.agent import Agent, Settings
from install.program.agent.http import Health
from install.program.agent.metrics import Metrics
from install.program.conflist import Entry
from install.program.freshness import reason_to_load
from install.program.generations import Generation
from install.program.host import OWN_PROC
from install.program.installer import Places
from install.program.node import Node
from install.program.selftest import Check, Verdict

OPTIONAL = (
    *(pins.SPLICE_REFUSAL, pins.SPLICE_REFUSAL + pins.AGAIN, pins.SPLICERS),
    pins.VISIT_SOCKET,
)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """What a load that went well has left, but for the kernel."""
    monkeypatch.setattr(Generation, "is_retired", lambda _: False)
    made = Node(tmp_path / "bpffs", tmp_path / "state")
    folder = made.bpffs / "gen-3"
    folder.mkdir(parents=True)
    for pin in (*PINS, *OPTIONAL):
        (folder / pin).touch()
    (made.bpffs / pins.CURRENT).symlink_to(folder.name)
    made.state_dir.mkdir()
    current = made.generations.current()
    assert current is not None
    write(made, {"mode": "full", **freshness.mark(made, current)})
    return made


def write(node: Node, document: object) -> None:
    (node.state_dir / names.NODE_JSON).write_text(json.dumps(document))


def test_programs_that_are_current_stay(node: Node) -> None:
    assert reason_to_load(node) is None


def test_sockets_that_were_told_to_leave(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a load that was broken off, or a canary that has recovered since and forgotten it."""
    monkeypatch.setattr(Generation, "is_retired", lambda _: True)
    assert "told to leave" in (reason_to_load(node) or "")


def test_no_programs_are_loaded(node: Node) -> None:
    (node.bpffs / pins.CURRENT).unlink()
    assert reason_to_load(node) == "nothing is loaded"


@pytest.mark.parametrize("pin", [*PINS, *OPTIONAL])
def test_a_pin_is_lost(node: Node, pin: str) -> None:
    (node.bpffs / "gen-3" / pin).unlink()
    assert "pins" in (reason_to_load(node) or "")


@pytest.mark.parametrize(
    "document",
    [
        {"mode": "full"},
        {"mode": "full", "programs": freshness.version(), "generation": "gen-2"},
        {"mode": "full", "programs": "of another version", "generation": "gen-3"},
    ],
)
def test_it_is_not_known_to_be_ours(node: Node, document: object) -> None:
    write(node, document)
    assert "gen-3" in (reason_to_load(node) or "")


def verdict(mode: str, name: str = "order", *, is_mended: bool = False) -> Verdict:
    check = Check(name, "", "right", "wrong", False)
    return Verdict(mode, [f"{name}: wrong"], [check], is_mended)


UNTRIED = verdict("off", "load")
LATE = replace(verdict("off", "bypass"), reasons=["load: wrong"])


@pytest.mark.parametrize("untried", [UNTRIED, LATE, replace(LATE, is_mended=True)])
def test_a_selftest_that_could_not_run_is_tried_again_and_no_more(
    node: Node,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    untried: Verdict,
) -> None:
    """The programs that are loaded stay, and the agent says why it tries, not another reason."""
    assert not untried.is_final
    for pin in pins.MENDS if untried.is_mended else ():
        (node.bpffs / "gen-3" / pin).touch()
    verdicts = [untried, replace(untried, reasons=["load: no memory"]), verdict("proxy-only")]
    monkeypatch.setattr(selftest, "run", lambda **_: verdicts.pop(0))
    monkeypatch.setattr(bpffs, "mount", lambda *_: False)
    monkeypatch.setattr(commands, "Programs", lambda: pytest.fail("it would load anew"))
    path = node.state_dir / names.NODE_JSON
    write(node, {**json.loads(path.read_text()), "mode": "off", "reasons": ["x"], "tried": False})
    for why in ("load: wrong", "load: no memory"):
        commands.load(node)
        found = "the self-test could not be carried through: " + why
        assert reason_to_load(node) == freshness.reason_to_try(node) == found
        assert node.state.node_mode() == ("off", why)
        assert "of another version" not in found
    assert freshness.reason_to_publish(node) is None
    commands.load(node)
    assert reason_to_load(node) is None
    assert node.state.node_mode() == ("proxy-only", "order: wrong")
    assert [each.number for each in node.generations.all()] == [3]
    assert "mode proxy-only because of order: wrong" in capfd.readouterr().err


def test_what_the_agent_says_of_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whether it counts as right: a task that is not is looked at later and later."""
    places = Places(node.state_dir, node.state_dir, node.state_dir, OWN_PROC)
    settings = Settings(places, Entry({}, {}), [], [], [], (), None, None, once=True)
    agent, events = Agent(node, settings, Metrics(node), Health()), list[str]()
    monkeypatch.setattr(bpffs, "mount", lambda *_: False)
    monkeypatch.setattr(log, "info", lambda event, *_, **__: events.append(event))
    path = node.state_dir / names.NODE_JSON
    tried = json.loads(path.read_text())
    after = [{**tried, "tried": False}, tried]
    monkeypatch.setattr(agent, "_child", lambda *_: write(node, after.pop(0)))
    write(node, {**tried, "tried": False})
    assert [agent._keep_programs() for _ in range(3)] == [False, False, True]
    assert events == ["trying", "trying", "loaded"]


@pytest.mark.parametrize(
    ("found", "lost", "modes"),  # node.json's: before, and when the load has failed
    [
        # These programs are to be mended before they load.
        (verdict("full", is_mended=True), "", ("off", "off")),
        (UNTRIED, PINS[0], ("off", "off")),
        (verdict("off"), "", ("proxy-only", "off")),  # the pods that run lose them
        (verdict("full"), pins.SPLICERS, ("proxy-only", "proxy-only")),
    ],
)
def test_a_selftest_is_not_all_that_is_missing(
    node: Node, monkeypatch: pytest.MonkeyPatch, found: Verdict, lost: str, modes: tuple[str, str]
) -> None:
    """And when it fails, the programs before are not used in a mode that they are not fit for."""

    def programs() -> None:
        raise LoadError("asked for")

    monkeypatch.setattr(selftest, "run", lambda **_: found)
    monkeypatch.setattr(bpffs, "mount", lambda *_: False)
    monkeypatch.setattr(commands, "Programs", programs)
    if lost:
        (node.bpffs / "gen-3" / lost).unlink()
    current = node.generations.current()
    assert current is not None
    write(node, {"mode": modes[0], "tried": False, **freshness.mark(node, current)})
    with pytest.raises(LoadError, match="asked for"):
        commands.load(node)
    assert node.state.node_mode()[0] == modes[1]


def test_fionread_is_to_be_left_from_now_on(node: Node) -> None:
    assert "setting" in (reason_to_load(replace(node, fionread="leave")) or "")


def test_the_mend_is_lost(node: Node) -> None:
    path = node.state_dir / names.NODE_JSON
    write(node, {**json.loads(path.read_text()), "mended": True})
    assert "mended no more" in (reason_to_load(node) or "")
    for pin in pins.MENDS:
        (node.bpffs / "gen-3" / pin).touch()
    assert reason_to_load(node) is None


def test_the_record_is_lost_or_torn(node: Node) -> None:
    (node.state_dir / names.NODE_JSON).write_text('{"mode": "fu')
    assert reason_to_load(node)
    write(node, [])
    assert reason_to_load(node)
    (node.state_dir / names.NODE_JSON).unlink()
    assert reason_to_load(node)
