# SPDX-License-Identifier: Apache-2.0
"""The cluster's switch: its ConfigMap read, kept, and told apart from what an operator pauses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bpf import abi
from cni_plugin import names, netconf
from cni_plugin.state import Attachment, State
from install.program import pauses, switch
from install.program.node import Node
from install.program.pauses import Pauses
from install.program.switch import Kept, Switch, SwitchError
from tests.unit.test_attachment import BLANK


def test_an_empty_configmap_says_nothing(tmp_path: Path) -> None:
    assert switch.read(tmp_path) == switch.read(tmp_path / "no-such") == Switch()


def test_every_key() -> None:
    found = switch.parse(
        {
            "paused": "true",
            "mode": "proxy-only",
            "excludeNamespaces": "shop, kube-system\nweb,shop",
            "excludePorts": "3306 8000-8100",
        }
    )
    assert found == Switch(
        True, "proxy-only", ("shop", "kube-system", "web"), ("3306", "8000-8100")
    )


@pytest.mark.parametrize(
    ("key", "text", "mentions"),
    [
        ("paused", "yes", '\'yes\' is neither "true" nor "false"'),
        ("paused", "", "neither"),
        ("Paused", "true", "'Paused' is no key; there are paused, mode"),
        ("mode", "fast", "'fast' is none of auto, full, proxy-only, off"),
        ("excludeNamespaces", "Shop", "'Shop' is no name of a namespace"),
        ("excludeNamespaces", '["shop"]', "no name of a namespace"),
        ("excludeNamespaces", 64 * "a", "no name of a namespace"),
        ("excludePorts", "mysql", "'mysql', no port"),
        ("excludePorts", "0", "not within 1 to 65535"),
        ("excludePorts", "9-1", "not within"),
        (
            "excludePorts",
            ",".join(map(str, range(1, 4 * abi.MAX_PORT_RANGES, 2))),
            "separate ranges",
        ),
    ],
)
def test_what_makes_no_sense_is_named(key: str, text: str, mentions: str) -> None:
    with pytest.raises(SwitchError) as raised:
        switch.parse({key: text})
    assert mentions in str(raised.value)
    assert key in str(raised.value)


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(SwitchError, match=r"mode: .*paused: "):
        switch.parse({"paused": "x", "mode": "y", "excludePorts": "80"})


def mounted(folder: Path, **texts: str) -> None:
    """As kubelet's atomic writer lays out a ConfigMap."""
    generation = folder / f"..{len(list(folder.iterdir()))}"
    generation.mkdir()
    for key, text in texts.items():
        (generation / key).write_text(text)
        (folder / key).unlink(missing_ok=True)
        (folder / key).symlink_to(f"..data/{key}")
    (folder / "..tmp").symlink_to(generation.name)
    (folder / "..tmp").rename(folder / "..data")


def test_a_mounted_configmap_is_read_as_one(tmp_path: Path) -> None:
    mounted(tmp_path, paused="true\n")
    assert switch.read(tmp_path) == Switch(paused=True)
    mounted(tmp_path, mode="off")  # the link of `paused` leads nowhere now
    assert switch.read(tmp_path) == Switch(mode="off")
    mounted(tmp_path, mode="\xff")
    with pytest.raises(SwitchError):
        switch.read(tmp_path)


names_of = st.from_regex(r"[a-z]{1,9}", fullmatch=True)
found_switches = st.builds(
    Switch,
    st.booleans(),
    st.sampled_from([None, *switch.MODES]),
    st.lists(names_of, unique=True, max_size=3).map(tuple),
    st.lists(st.integers(1, 65535).map(str), unique=True, max_size=3).map(tuple),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found_switches)
def test_the_plugin_reads_what_is_kept(tmp_path: Path, wanted: Switch) -> None:
    state = State(str(tmp_path))
    what = Kept(wanted, True, frozenset({2**64 - 1}))
    switch.keep(state, what)
    assert switch.kept(state) == what
    conf = netconf.under_switch(netconf.parse({"excludeNamespaces": ["own"]}), state.switch())
    assert conf.exclude_namespaces == {"own", *wanted.exclude_namespaces}
    assert [str(first) for first, _ in conf.exclude_ports] == list(wanted.exclude_ports)
    assert conf.mode == (wanted.mode or "auto")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"paused": true}'])
def test_what_is_kept_and_damaged_counts_as_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / names.SWITCH_JSON).write_text(text)
    assert switch.kept(State(str(tmp_path))) is None


@dataclass(eq=False)
class Generation:
    """What install.program.generations.Generation does to the kernel, done to two variables."""

    paused: bool = False
    pods: set[int] = field(default_factory=set)

    def flags(self) -> int:
        return abi.CONTROL_PAUSED if self.paused else 0

    def set_paused(self, paused: bool, *, is_trial: bool = False) -> None:
        assert not is_trial
        self.paused = paused

    def paused_pods(self) -> set[int]:
        return set(self.pods)

    def set_paused_pods(self, pods: set[int]) -> None:
        self.pods = set(pods)


@dataclass
class ScratchNode:
    """As much of install.program.node.Node as settle() needs."""

    state: State
    loaded: list[Generation]
    mode: str = "full"

    @property
    def generations(self) -> ScratchNode:
        return self

    def complete(self) -> list[Generation]:
        return self.loaded

    def current(self) -> Generation | None:
        return self.loaded[-1] if self.loaded else None

    def attachments(self) -> list[Attachment]:
        return [BLANK._replace(pod_id=1, pod_namespace="shop"), BLANK._replace(pod_id=2)]

    def settle(
        self,
        change: Callable[[Pauses], Pauses] = lambda own: own,
        wanted: Switch | None = None,
    ) -> None:
        pauses.apply(cast(Node, self), change, wanted)


@pytest.fixture(autouse=True)
def pods_that_are_there(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    there = {1, 2}
    monkeypatch.setattr(pauses, "_alive", lambda _node: frozenset(there))
    return there


def scratch(folder: Path) -> ScratchNode:
    (folder / names.NODE_JSON).write_text(json.dumps({"mode": "full"}))
    (folder / names.SWITCH_JSON).unlink(missing_ok=True)
    return ScratchNode(State(str(folder)), [Generation()])


STEPS: dict[str, Callable[[Pauses], Pauses]] = {
    "pause": lambda own: replace(own, node=True),
    "resume": lambda _: Pauses(),
    "pause pod 1": lambda own: replace(own, pods=own.pods | {1}),
    "resume pod 1": lambda own: replace(own, pods=own.pods - {1}),
    "pause pod 2": lambda own: replace(own, pods=own.pods | {2}),
}
SWITCHES = {
    "nothing": Switch(),
    "stop": Switch(paused=True),
    "off": Switch(mode="off"),
    "not shop": Switch(exclude_namespaces=("shop",)),
}


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*STEPS, *SWITCHES, "load", "look"]), max_size=12))
def test_each_ends_its_own_pauses_and_no_others(tmp_path: Path, steps: list[str]) -> None:
    """Whatever operator and switch do in turn, what is paused is what either of them wants."""
    node, own, wanted = scratch(tmp_path), Pauses(), Switch()
    for step in steps:
        if step in STEPS:
            own = STEPS[step](own)
            node.settle(STEPS[step])
        elif step in SWITCHES:
            wanted = SWITCHES[step]
            node.settle(wanted=wanted)
        elif step == "load":  # Generations.publish
            before = node.loaded[-1]
            node.loaded.append(Generation(before.paused, before.paused_pods()))
            node.settle()
        else:
            node.settle()
        excluded = {1} if "shop" in wanted.exclude_namespaces else set()
        for generation in node.loaded:
            assert generation.paused == (own.node or wanted.is_stop), steps
            assert generation.pods == own.pods | excluded, steps


def test_the_pause_of_a_pod_ends_with_it(tmp_path: Path, pods_that_are_there: set[int]) -> None:
    node = scratch(tmp_path)
    for step in ("pause pod 1", "pause pod 2"):
        node.settle(STEPS[step])
    assert node.loaded[0].pods == {1, 2}
    pods_that_are_there.remove(1)
    node.settle()
    assert node.loaded[0].pods == {2}


def test_a_stop_reaches_a_node_that_has_booted(tmp_path: Path) -> None:
    """What is kept is gone with /run, and what is loaded is new and not paused."""
    node = scratch(tmp_path)
    node.loaded = []
    node.settle(wanted=Switch(paused=True))
    node.loaded = [Generation()]
    node.settle()
    assert node.loaded[0].paused
    node.settle(wanted=Switch())
    assert not node.loaded[0].paused


def test_generations_that_an_unfit_kernel_has_paused_stay_so(tmp_path: Path) -> None:
    node = scratch(tmp_path)
    (tmp_path / names.NODE_JSON).write_text(json.dumps({"mode": "off"}))
    older, current = Generation(paused=True), Generation()
    node.loaded = [older, current]
    node.settle(wanted=Switch(paused=True))
    assert (older.paused, current.paused) == (True, True)
    node.settle(wanted=Switch())
    assert (older.paused, current.paused) == (True, False)


def test_a_state_folder_that_is_full_does_not_keep_from_pausing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    node = scratch(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(switch, "keep", full)
    node.settle(wanted=Switch(paused=True))
    assert node.loaded[0].paused
    assert "No space left" in capfd.readouterr().err


def test_damage_is_mended(tmp_path: Path) -> None:
    """The plugin leaves every pod on TCP while it is there."""
    node = scratch(tmp_path)
    (tmp_path / names.SWITCH_JSON).write_text("{")
    node.settle()
    assert switch.kept(node.state) == Kept()


def test_a_state_folder_that_cannot_be_read_does_not_keep_from_pausing(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)  # ELOOP, also for root
    node = ScratchNode(State(str(loop)), [Generation()])
    node.settle(STEPS["pause"])
    assert node.loaded[0].paused
