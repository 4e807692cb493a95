# SPDX-License-Identifier: Apache-2.0
"""Whether FIONREAD is mended on a node: what says so, what the self-test makes of it, and how long
the pins stay."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bpf import pins, preemption
from bpf.loader import PINS
from cni_plugin import names
from install.program import cli as program
from install.program import selftest
from install.program.agent import command
from install.program.generations import Generation, Generations
from install.program.node import Node
from install.program.selftest import Check


def node(tmp_path: Path, entry: dict[str, str] | None) -> Node:
    """One with this in our entry of the network configuration."""
    conf_dir = tmp_path / "net.d"
    conf_dir.mkdir()
    state = tmp_path / "state"
    if entry is not None:
        ours = {"type": names.PLUGIN, "stateDir": str(state), **entry}
        conflist = {"cniVersion": "1.0.0", "name": "any", "plugins": [{"type": "first"}, ours]}
        (conf_dir / "10-any.conflist").write_text(json.dumps(conflist))
    return Node(tmp_path / "bpffs", state, conf_dir)


@pytest.mark.parametrize(
    ("entry", "option", "mends"),
    [
        (None, None, True),
        ({}, None, True),
        ({"fionread": "mend"}, None, True),
        ({"fionread": "leave"}, None, False),
        ({"fionread": "leave"}, "mend", True),
        ({}, "leave", False),
    ],
)
def test_what_says_so(
    tmp_path: Path, entry: dict[str, str] | None, option: str | None, mends: bool
) -> None:
    assert replace(node(tmp_path, entry), fionread=option).mends_fionread is mends


@pytest.mark.parametrize("choice", names.FIONREAD_CHOICES)
def test_the_agent_hands_it_on(tmp_path: Path, choice: str) -> None:
    arguments = argparse.Namespace(cni_conf_dir=tmp_path)
    told = replace(node(tmp_path, None), fionread=choice)
    options = command._fionread_options(told, arguments)
    parsed = program.build_parser().parse_args(["load", *options])
    assert (parsed.fionread, parsed.cni_conf_dir) == (choice, tmp_path)


def check(name: str, *, ok: bool) -> Check:
    return Check(name, "", "FIONREAD 1000", "FIONREAD 0", ok)


def test_what_the_selftest_says_of_it() -> None:
    wrong, right = check("fionread_tcp", ok=False), check("fionread_bypassed", ok=True)
    assert selftest._remarked(wrong, "not mended: x").found == "FIONREAD 0 (not mended: x)"
    assert selftest._remarked(right, "not mended: x") == right
    assert selftest._remarked(right, "mended").found == "FIONREAD 0 (mended)"
    assert selftest._remarked(right, "") == right
    assert selftest.decide([wrong, right]).mode == "proxy-only"
    assert selftest.decide([right]).mode == "full"


@pytest.mark.parametrize(
    ("traced", "has_sockets", "stays"),
    [
        (pins.MENDS[0], True, True),
        (pins.MENDS[0], False, False),
        (pins.SPLICE_REFUSAL, True, True),
        ("", True, False),
    ],
)
def test_the_pins_stay_while_sockets_need_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    traced: str,
    has_sockets: bool,
    stays: bool,
) -> None:
    folder = tmp_path / "bpffs" / "gen-1"
    folder.mkdir(parents=True)
    for pin in (*PINS, *((traced,) if traced else ())):
        (folder / pin).touch()
    monkeypatch.setattr(Generation, "has_sockets", lambda _self: has_sockets)
    Generations(folder.parent).remove_all()
    assert folder.exists() is stays


@pytest.mark.parametrize(
    ("failed", "said"),
    [
        ([], []),
        (["fionread_tcp", "fionread_ipv6"], ["FIONREAD"]),
        (["fionread_tcp", "splice"], ["FIONREAD", "splice(2)"]),
        (["order"], ["do not behave as TCP's"]),
        (["load"], ["Linux 6.1"]),
        (["bypass"], ["busy"]),
        (["splice", "bypass"], ["splice(2)", "busy"]),
    ],
)
def test_why_the_mode_is_less_in_an_operators_words(failed: list[str], said: list[str]) -> None:
    checks = [check(name, ok=False) for name in failed] + [check("half_close", ok=True)]
    faults = selftest.decide(checks).faults
    assert len(faults) == len(said)
    assert all(words in fault for words, fault in zip(said, faults, strict=True))


@pytest.mark.parametrize(
    ("plain", "bypassed", "is_final"),
    [
        ({"lost": 0}, {"lost": 5}, True),
        ({"lost": 0}, {"failed": "ConnectionResetError: reset"}, True),
        ({"lost": 0}, {"failed": "TimeoutError: timed out"}, True),  # it may be a lost wake-up
        ({"failed": "ConnectionResetError: reset"}, {"lost": 0}, False),
        ({"failed": "TimeoutError: timed out"}, {"failed": "TimeoutError: timed out"}, False),
    ],
)
def test_a_kernel_is_not_to_blame_for_a_busy_node(
    plain: dict[str, object], bypassed: dict[str, object], is_final: bool
) -> None:
    """What came too late says nothing, and is tried again."""
    right = check("half_close", ok=True)
    for name, mode in (("order", "off"), ("fionread_tcp", "proxy-only")):
        wrong = selftest._remarked(selftest.compare(name, plain, bypassed), "not mended: x")
        verdict = selftest.decide([wrong, right])
        assert (verdict.mode, verdict.is_final) == (mode, is_final)
        assert (verdict.faults == [selftest._LATE]) == (not is_final)
    assert not selftest.decide([right, check("bypass", ok=False)]).is_final
    assert selftest.decide([right, check("bypass", ok=True)]).is_final


@pytest.mark.parametrize(
    ("version", "debugfs", "model", "is_within"),
    [
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.1", "none (voluntary) full\n", "voluntary", False),
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.12", "none voluntary (full)\n", "full", True),
        ("#1 SMP PREEMPT_DYNAMIC Debian 7.3", "full (lazy)\n", "lazy", True),
        ("#1 SMP PREEMPT_DYNAMIC @0", "", "", True),
        ("#1 SMP PREEMPT Debian", "", "full", True),
        ("#1 SMP PREEMPT_RT Debian", "", "full", True),
        ("#1 SMP Debian", "", "voluntary", False),
    ],
)
def test_what_a_kernel_says_of_preemption(
    monkeypatch: pytest.MonkeyPatch, version: str, debugfs: str, model: str, is_within: bool
) -> None:
    monkeypatch.setattr("bpf.preemption.os.uname", lambda: SimpleNamespace(version=version))
    monkeypatch.setattr(preemption, "_read_debugfs", lambda _: debugfs)
    assert preemption.model() == model
    assert preemption.is_within_programs(model) is is_within


def test_a_kernel_without_debugfs_says_nothing() -> None:
    assert preemption._read_debugfs("no/such/file") == ""
