# SPDX-License-Identifier: Apache-2.0
"""When the agent loads the programs anew, and when it leaves them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bpf.loader import PINS
from cni_plugin import names
from install import freshness
from install.commands import Node
from install.freshness import reason_to_load


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """What a load that went well has left, but for the kernel."""
    made = Node(tmp_path / "bpffs", tmp_path / "state")
    folder = made.bpffs / "gen-3"
    folder.mkdir(parents=True)
    for pin in PINS:
        (folder / pin).touch()
    (made.bpffs / names.CURRENT).symlink_to(folder.name)
    made.state_dir.mkdir()
    current = made.generations.current()
    assert current is not None
    write(made, {"mode": "full", **freshness.mark(made, current)})
    return made


def write(node: Node, document: object) -> None:
    (node.state_dir / names.NODE_JSON).write_text(json.dumps(document))


def test_programs_that_are_current_stay(node: Node) -> None:
    assert reason_to_load(node) is None


def test_no_programs_are_loaded(node: Node) -> None:
    (node.bpffs / names.CURRENT).unlink()
    assert reason_to_load(node) == "nothing is loaded"


@pytest.mark.parametrize("pin", PINS)
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


def test_fionread_is_to_be_left_from_now_on(node: Node) -> None:
    assert "setting" in (reason_to_load(replace(node, fionread="leave")) or "")


def test_the_mend_is_lost(node: Node) -> None:
    path = node.state_dir / names.NODE_JSON
    write(node, {**json.loads(path.read_text()), "mended": True})
    assert "mended no more" in (reason_to_load(node) or "")
    for pin in names.MENDS:
        (node.bpffs / "gen-3" / pin).touch()
    assert reason_to_load(node) is None


def test_the_record_is_lost_or_torn(node: Node) -> None:
    (node.state_dir / names.NODE_JSON).write_text('{"mode": "fu')
    assert reason_to_load(node)
    write(node, [])
    assert reason_to_load(node)
    (node.state_dir / names.NODE_JSON).unlink()
    assert reason_to_load(node)
