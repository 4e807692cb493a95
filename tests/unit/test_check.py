# SPDX-License-Identifier: Apache-2.0
"""`check`: each finding against a node that is so, and what the answer as a whole says."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cni_plugin import names
from cni_plugin.state import State
from install.program import canary, exits, host, joiner, report, selftest
from install.program import cli as program
from install.program import status as tables
from install.program.agent.agent import Agent, Settings
from install.program.agent.http import Health
from install.program.agent.metrics import Metrics
from install.program.check import command, finding, kernel, pods
from install.program.check import node as of_node
from install.program.check.finding import Finding
from install.program.check.node import Asked
from install.program.conflist import Entry
from install.program.generations import Generation
from install.program.host import OWN_PROC
from install.program.in_force import in_force
from install.program.installer import Places
from install.program.node import Node
from install.program.passes import Passes
from install.program.report import Facts, Failure
from install.program.switch import Kept, Switch, keep
from tests.unit.cases import ROOT
from tests.unit.test_attachment import BLANK

GENERATION = Generation(Path("/no/bpffs/gen-1"))
WELL = Facts(
    current=GENERATION,
    generations=[GENERATION],
    paused=False,
    paused_pods=frozenset(),
    mode="full",
    reason="it is",
    attachments=[BLANK._replace(pod_id=1, pod_namespace="shop", pod_name="cart")],
    attached=frozenset({1}),
    failures=[],
)
PLACES = Places(GENERATION.folder, GENERATION.folder, GENERATION.folder, OWN_PROC)
FAILURE = Failure("c0ffee", "eth0", "shop", "late", "CgroupNotFound: none", 0)


def anchors(path: Path) -> set[str]:
    """What links to a document's headings look like: lower case, no punctuation, dashes."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


LINKS = [text for name, text in vars(finding).items() if name.isupper()]


@pytest.mark.parametrize("link", LINKS)
def test_every_link_leads_somewhere(link: str) -> None:
    file, _, anchor = link.partition("#")
    assert anchor in anchors(ROOT / file)


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        (WELL, exits.WELL),
        (replace(WELL, current=None, generations=[]), exits.NOT),
        (replace(WELL, generations=[]), exits.NOT),  # some of its pins are gone
        (replace(WELL, mode="off"), exits.NOT),
        (replace(WELL, mode="off", forced="full"), exits.LESS),
        (replace(WELL, mode="off", forced="proxy-only"), exits.LESS),
        (replace(WELL, mode="proxy-only", forced="full"), exits.LESS),
        (replace(WELL, mode="proxy-only", switch=Kept(Switch(mode="full"))), exits.LESS),
        (replace(WELL, forced="full"), exits.WELL),
        (replace(WELL, forced="off"), exits.NOT),
        (replace(WELL, plugin_problem="the node cannot run it"), exits.LESS),
        (replace(WELL, lost_answers=0), exits.WELL),
        (replace(WELL, lost_answers=3), exits.LESS),
        (replace(WELL, mode="proxy-only"), exits.LESS),
        (replace(WELL, paused=True), exits.LESS),
        (replace(WELL, paused=True, mode="off"), exits.NOT),
        (replace(WELL, paused_pods=frozenset({1})), exits.LESS),
        (replace(WELL, attached=frozenset()), exits.LESS),
        (replace(WELL, failures=[FAILURE]), exits.LESS),
    ],
)
def test_what_status_exits_with(facts: Facts, status: int) -> None:
    assert facts.exit_status == status
    found = of_node._mode("mode", facts.mode, facts.reason, facts.named_mode)
    assert found.status <= status  # `check` has a finding for each of the other reasons


@pytest.mark.parametrize(
    ("release", "status"),
    [
        ("5.10.0-33-amd64", exits.NOT),
        ("6.0.19", exits.NOT),
        ("6.1.0-37-amd64", exits.WELL),
        ("6.18.44", exits.WELL),
        ("10.0", exits.WELL),
    ],
)
def test_kernel(release: str, status: int) -> None:
    assert kernel._version(release).status == status


def test_the_oldest_kernel_is_the_readmes() -> None:
    oldest = ".".join(map(str, kernel.OLDEST))
    text = (ROOT / "README.md").read_text()
    assert f"- Linux {oldest} or newer" in text
    assert f"before {oldest} | `off`" in text
    assert f"Linux {oldest} is needed" in Path(selftest.__file__).read_text()


def test_btf_that_is_missing(tmp_path: Path) -> None:
    assert kernel._btf(tmp_path / "vmlinux").status == exits.NOT
    (tmp_path / "vmlinux").write_bytes(bytes(2**20))
    assert kernel._btf(tmp_path / "vmlinux") == finding.well(
        "btf", f"{tmp_path}/vmlinux, 1.0 MiB", finding.NEEDS
    )


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("[none] integrity confidentiality\n", exits.WELL),
        ("none [integrity] confidentiality\n", exits.LESS),
        ("none integrity [confidentiality]\n", exits.NOT),
    ],
)
def test_lockdown(tmp_path: Path, text: str, status: int) -> None:
    (tmp_path / "lockdown").write_text(text)
    assert kernel._lockdown(tmp_path / "lockdown").status == status


def test_bpffs_is_missed_only_after_the_installation(tmp_path: Path) -> None:
    folder = tmp_path / "tcpip-bypass"
    assert kernel._bpffs(folder, before_install=True).status == exits.WELL
    found = kernel._bpffs(folder, before_install=False)
    assert found.status == exits.NOT
    assert f"mount -t bpf bpf {tmp_path}" in found.hint


def test_the_mend_is_missed_only_where_it_is_needed() -> None:
    tracing = finding.less("tracing", "refused", "a hint")
    for mode, status in (("full", exits.WELL), ("proxy-only", exits.LESS), ("off", exits.LESS)):
        findings = [tracing, of_node._mode("mode", mode, "why", None)]
        assert command.excused(findings)[0].status == status
    locked = finding.broken("lockdown", "confidentiality", "a hint")
    findings = [locked, of_node._mode("mode", "full", "", None)]
    assert command.excused(findings)[0].status == exits.NOT


@pytest.mark.parametrize("allowed", ["proxy-only", "off"])
def test_a_forced_mode_does_not_excuse_that_fionread_is_not_mended(allowed: str) -> None:
    named = ("full", "the configuration")
    locked = finding.less("lockdown", "integrity", "a hint")
    reason = "fionread_tcp: expected 1000, found 0 (not mended: lockdown)"
    found = command.excused([locked, of_node._mode("mode", allowed, reason, named)])
    assert [each.status for each in found] == [exits.LESS, exits.LESS]
    assert reason in found[1].found
    assert all(each.hint for each in found)
    well = command.excused([locked, of_node._mode("mode", "full", "", named)])
    assert command.gravest(well) == exits.WELL


@pytest.mark.parametrize(
    ("mended", "answers", "lost", "status", "says"),
    [
        (True, "", 0, exits.WELL, "it is mended"),
        (True, "", 3, exits.LESS, "3 answers could not be written"),
        (True, "it does not answer any more", 0, exits.NOT, "it does not answer any more"),
        (True, OSError(1, "not permitted"), 0, exits.NOT, "not permitted"),
        (False, "", None, None, ""),
    ],
)
def test_whether_fionread_is_mended_where_the_mode_rests_on_it(
    *,
    mended: bool,
    answers: str | OSError,
    lost: int | None,
    status: int | None,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def why_not(generation: Generation) -> str:
        assert generation == GENERATION
        if isinstance(answers, OSError):
            raise answers
        return answers

    monkeypatch.setattr(canary, "try_programs", why_not)
    (tmp_path / names.NODE_JSON).write_text(json.dumps({"mode": "full", "mended": mended}))
    asked = Asked(Node(tmp_path, tmp_path), PLACES, (), ROOT)
    facts = replace(WELL, lost_answers=lost)
    found = [each for each in of_node.installed(asked, facts) if each.name == "fionread"]
    assert [each.status for each in found] == ([] if status is None else [status])
    assert all(says in each.found for each in found)


def test_a_forced_mode_is_named_with_what_the_self_test_allows() -> None:
    found = of_node._mode("mode", "proxy-only", "FIONREAD", ("full", "the configuration"))
    assert found.status == exits.LESS
    assert "of our entry" in found.hint
    said = "full, forced by the configuration; the self-test allows proxy-only: FIONREAD"
    assert found.found == said


@pytest.mark.parametrize(
    ("kept", "hint"),
    [
        ('{"mode": "off"}', "another kernel"),
        ('{"mode": "off", "tried": false}', "load"),
        ("", "load"),
    ],
)
def test_an_untried_kernel_is_not_to_blame(kept: str, hint: str, tmp_path: Path) -> None:
    if kept:
        (tmp_path / names.NODE_JSON).write_text(kept)
    asked = Asked(Node(tmp_path, tmp_path), PLACES, (), ROOT)
    facts = replace(WELL, mode="off", reason="it is so")
    (found,) = [each for each in of_node.installed(asked, facts) if each.name == "mode"]
    assert hint in found.hint


class Box:
    """A sandbox as the runtime lists it."""

    def __init__(
        self, name: str, annotations: dict[str, str] | None = None, *, ready: bool = True
    ) -> None:
        self.id, self.ready = f"id-{name}", ready
        self.pod_namespace, self.pod_name, self.pod_uid = "shop", name, "uid"
        self.annotations = annotations or {}


def test_every_pod_has_a_state_and_a_reason() -> None:
    records = [
        BLANK._replace(
            pod_id=number, pod_namespace="shop", pod_name=name, container_id=f"id-{name}"
        )
        for number, name in enumerate(("fast", "lost", "held"))
    ]
    facts = replace(
        WELL,
        attachments=records,
        attached=frozenset({0, 2}),
        paused_pods=frozenset({2}),
        failures=[replace(FAILURE, container_id="id-late")],
    )
    known = pods.recorded(facts)
    mesh = {names.SIDECAR_STATUS: "{}"}
    boxes: Any = [
        *(Box(name, mesh) for name in ("fast", "late", "new")),
        Box("plain"),
        Box("opted", {**mesh, names.ENABLED: "false"}),
        Box("ended", mesh, ready=False),
    ]
    now = in_force(State("/no/state"), {"mode": "full"}, Path("10.conflist"))
    found = {each.name: each for each in [*known, *pods.others(boxes, known, now)]}
    assert {name: each.state for name, each in found.items()} == {
        "fast": pods.ACCELERATED,
        "lost": pods.LOST,
        "held": pods.PAUSED,
        "late": pods.FAILED,
        "new": pods.WAITING,
        "plain": pods.LEFT_OUT,
        "opted": pods.LEFT_OUT,
    }
    assert found["late"].why == FAILURE.reason
    assert found["plain"].why == "the pod is not in the mesh"
    assert f"{names.ENABLED} is false" in found["opted"].why
    summary = of_node._summary(list(found.values()), "")
    assert summary.status == exits.LESS
    assert "shop/late failed: CgroupNotFound: none" in summary.hint
    assert "opted" not in summary.hint
    assert of_node._summary([found["fast"], found["plain"]], "").status == exits.WELL


def node_with(folder: Path, entry: dict[str, Any], switch: Switch | None = None) -> Asked:
    """A node whose runtime uses this entry of ours, with the cluster's switch."""
    state = State(str(folder / "state"))
    state.make()
    (folder / "state" / names.NODE_JSON).write_text('{"mode": "full"}')
    if switch is not None:
        keep(state, Kept(switch))
    (folder / "net.d").mkdir()
    ours = {"type": names.PLUGIN, "stateDir": str(folder / "state"), **entry}
    conflist = {"cniVersion": "1.0.0", "name": "any", "plugins": [{"type": "first"}, ours]}
    (folder / "net.d" / "10.conflist").write_text(json.dumps(conflist))
    with socket.socket(socket.AF_UNIX) as runtime:
        runtime.bind(str(folder / "cri.sock"))
    node = Node(folder / "bpffs", folder / "state", folder / "net.d")
    places = Places(folder / "net.d", folder, folder, OWN_PROC)
    return Asked(node, places, (folder / "cri.sock",), ROOT)


@pytest.mark.parametrize(
    ("given", "state", "why"),
    [
        (({}, None), pods.WAITING, "it started without us"),
        (({}, Switch()), pods.WAITING, "it started without us"),
        (({}, Switch(paused=True)), pods.WAITING, "it started without us"),  # ADD takes it in
        (({}, Switch(mode="off")), pods.LEFT_OUT, "off on this node: the cluster's switch says so"),
        (({"mode": "full"}, Switch(mode="off")), pods.LEFT_OUT, "the cluster's switch says so"),
        (({"mode": "off"}, Switch()), pods.LEFT_OUT, "off on this node: the configuration says so"),
        (({"mode": "off"}, Switch(mode="auto")), pods.WAITING, "it started without us"),
        (({}, Switch(exclude_namespaces=("shop",))), pods.LEFT_OUT, "namespace shop is excluded"),
        (({}, Switch(exclude_namespaces=("web",))), pods.WAITING, "it started without us"),
    ],
)
def test_no_pod_waits_that_the_switch_excludes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[dict[str, Any], Switch | None],
    state: str,
    why: str,
) -> None:
    asked = node_with(tmp_path, *given)
    boxes = [Box("new", {names.SIDECAR_STATUS: "{}"})]
    monkeypatch.setattr(pods, "sandboxes_of", lambda _socket: boxes)
    summary, (found,) = of_node.pods(asked, report.facts(asked.node))
    assert found.state == state
    assert why in found.why
    assert summary.status == (exits.LESS if state == pods.WAITING else exits.WELL)


@pytest.mark.parametrize(
    ("entry", "switch", "says"),
    [
        ({"excludePorts": ["no-port"]}, "{}", "10.conflist is not valid"),
        ({}, "{", "the cluster's switch"),  # ADD leaves every pod alone until it is mended
        ({}, '{"mode": "off"}', "the cluster's switch is damaged"),
    ],
)
def test_an_entry_or_a_switch_that_makes_no_sense_is_said(
    tmp_path: Path, entry: dict[str, Any], switch: str, says: str
) -> None:
    asked = node_with(tmp_path, entry)
    (tmp_path / "state" / names.SWITCH_JSON).write_text(switch)
    summary, _ = of_node.pods(asked, WELL)
    assert summary.status == exits.LESS
    assert says in summary.found


BY_SWITCH = Kept(Switch(paused=True), holds_node=True)
BY_BOTH = Kept(Switch(paused=True))
RESUME, EDIT = "tcpip-bypass-node resume", "edit the ConfigMap tcpip-bypass-switch"


@pytest.mark.parametrize(
    ("kept", "by", "hints"),
    [
        (Kept(), ("operator",), {RESUME}),
        (BY_SWITCH, ("switch",), {EDIT}),
        (Kept(Switch(mode="off"), holds_node=True), ("switch",), {EDIT}),
        (BY_BOTH, ("operator", "switch"), {RESUME, EDIT}),
    ],
)
def test_each_pause_has_its_own_hint(kept: Kept, by: tuple[str, ...], hints: set[str]) -> None:
    facts = replace(WELL, paused=True, switch=kept)
    document = report.as_json(replace(facts, generations=[]))
    assert document["paused_by"] == by
    assert facts.paused_by == by
    asked = Asked(Node(GENERATION.folder, GENERATION.folder), PLACES, (), ROOT)
    (found,) = [each for each in of_node.installed(asked, facts) if each.name == "paused"]
    (pod,) = pods.recorded(facts)
    assert pod.state == pods.PAUSED
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*tables._head(facts))
    for text in (found.hint, pod.why, console.export_text()):
        assert {each for each in (RESUME, EDIT) if each in text} == hints
    assert found.link == (finding.SWITCH if "switch" in by else finding.CHECKS)


@pytest.mark.parametrize(
    ("kept", "by", "hint"),
    [
        (Kept(), ("operator",), f"{RESUME} --pod shop/cart"),
        (Kept(Switch(exclude_namespaces=("shop",)), False, frozenset({1})), ("switch",), EDIT),
    ],
)
def test_each_pause_of_a_pod_has_its_own_hint(kept: Kept, by: tuple[str, ...], hint: str) -> None:
    facts = replace(WELL, paused_pods=frozenset({1}), switch=kept)
    (pod,) = pods.recorded(facts)
    assert (pod.state, pod.why.split(": ")[1].startswith(hint)) == (pods.PAUSED, True)
    (document,) = report.as_json(replace(facts, generations=[]))["pods"]
    assert document["paused_by"] == by
    labels = [text.plain for text in tables._labels(facts.attachments[0], facts)]
    assert labels[1] == ("paused by the switch" if by == ("switch",) else "paused")


@pytest.mark.parametrize(
    ("forced", "named", "head", "hint"),
    [
        (None, None, "mode proxy-only: it is", "another kernel"),
        ("full", None, "mode full, which the configuration forces; the self-test", "of our entry"),
        ("full", "off", "mode off, which the cluster's switch forces; the self-test", "ConfigMap"),
        ("full", "auto", "mode proxy-only: it is", "another kernel"),
        ("off", None, "mode off, which the configuration forces", "of our entry"),
    ],
)
def test_the_mode_in_force_is_named(
    forced: str | None, named: str | None, head: str, hint: str
) -> None:
    facts = replace(WELL, mode="proxy-only", forced=forced, switch=Kept(Switch(mode=named)))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(*tables._head(facts))
    assert head in console.export_text()
    found = of_node._mode("mode", facts.mode, facts.reason, facts.named_mode)
    assert found.found.startswith(facts.mode_in_force)
    assert found.status == max(exits.LESS, exits.of_mode(facts.mode_in_force))
    assert hint in found.hint


@pytest.mark.parametrize(
    ("entry", "switch", "said"),
    [
        ({}, None, []),
        ({"mode": "off"}, None, ["mode is off: the configuration says so"]),
        ({}, Switch(mode="off"), ["mode is off: the cluster's switch says so"]),
        ({"mode": "off"}, Switch(mode="full"), []),
        (
            {},
            Switch(paused=True),
            ["all bytes go by TCP: the ConfigMap tcpip-bypass-switch says so"],
        ),
    ],
)
def test_what_readyz_remarks(
    tmp_path: Path, entry: dict[str, Any], switch: Switch | None, said: list[str]
) -> None:
    asked, health = node_with(tmp_path, entry, switch), Health()
    settings = Settings(
        places=asked.places,
        entry=Entry({}, {}),
        load_options=[],
        gc_options=[],
        join_options=[],
        cri_sockets=(),
        question=None,
        switch_dir=None,
        once=True,
    )
    Agent(asked.node, settings, Metrics(asked.node), health)
    assert health.remarks() == said


def test_the_gravest_finding_is_the_answer() -> None:
    found = [finding.well("a", ""), finding.broken("b", "", "h"), finding.less("c", "", "h")]
    assert command.gravest(found) == exits.NOT
    lines = command._lines(found)
    assert [line[0] for line in lines if line[:1] in "✔!✘" and line] == ["✔", "✘", "!", "✘"]
    document = command.as_json(found, [])
    assert document["status"] == "does not work"
    assert [each["status"] for each in document["findings"]] == [
        "well",
        "does not work",
        "works with less",
    ]
    assert Finding("a", exits.WELL, "").link in LINKS


PLUGIN = """\
#! /bin/sh
echo '{"cniVersion": "1.1.0", "supportedVersions": ["1.1.0"]}'
"""


def plugin(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / names.PLUGIN).write_text(text)
    (folder / names.PLUGIN).chmod(0o755)


def test_the_plugin_is_tried(tmp_path: Path) -> None:
    """The one that is to be installed, and then the one that is: as the runtime would call it."""
    source, bin_dir = tmp_path / "plugin", tmp_path / "bin"
    asked = Asked(Node(tmp_path, tmp_path), Places(tmp_path, bin_dir, source, OWN_PROC), (), ROOT)
    assert "no plugin in" in of_node._runs(asked).found
    plugin(source, PLUGIN)
    assert of_node._runs(asked).status == exits.WELL
    plugin(source, "#!/bin/sh\necho broken\nexit 1\n")
    found = of_node._runs(asked)
    assert found.status == exits.NOT
    assert "it ends with 1: 'broken'" in found.found
    plugin(tmp_path / "older", PLUGIN)
    bin_dir.mkdir()
    (bin_dir / names.PLUGIN).symlink_to(tmp_path / "older" / names.PLUGIN)
    assert of_node._runs(asked).status == exits.WELL


def test_why_the_last_installation_was_refused_is_said(tmp_path: Path) -> None:
    """After a withdrawal the stub stands there, and an older plugin that runs tells nothing."""
    source, bin_dir = tmp_path / "plugin", tmp_path / "bin"
    asked = Asked(Node(tmp_path, tmp_path), Places(tmp_path, bin_dir, source, OWN_PROC), (), ROOT)
    plugin(source, PLUGIN)
    plugin(bin_dir, PLUGIN)
    facts = replace(WELL, plugin_problem="the node cannot run the plugin: noexec")
    (found,) = [each for each in of_node.installed(asked, facts) if each.name == "plugin runs"]
    assert (found.status, found.found) == (exits.NOT, facts.plugin_problem)
    (found,) = [each for each in of_node.installed(asked, WELL) if each.name == "plugin runs"]
    assert found.status == exits.WELL


def test_in_a_pod_the_node_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an option, as `kubectl exec ... -- tcpip-bypass-node check` is documented."""
    monkeypatch.setattr(host, "POD_PROC", tmp_path)
    commands = ("check", "bugreport", "install", "uninstall", "load", "estimate", "compare")
    for mounted in (OWN_PROC, tmp_path):
        if mounted == tmp_path:
            (tmp_path / "1").mkdir()
        parser = program.build_parser()
        assert {parser.parse_args([each]).host_proc for each in commands} == {mounted}
        given = parser.parse_args(["check", "--host-proc", "/proc"])
        assert given.host_proc == OWN_PROC
        assert parser.parse_args(["agent"]).host_proc == mounted
    assert program.places_of(parser.parse_args(["check"])).files.proc == tmp_path


def test_the_joiner_is_missed() -> None:
    assert of_node._joiner(WELL).status == exits.WELL
    found = of_node._joiner(replace(WELL, joining_problem=report.NO_JOINER))
    assert (found.status, found.found) == (exits.NOT, report.NO_JOINER)


@dataclass(frozen=True)
class Joined(Generation):
    """A generation that needs no kernel: its flag and its joiner's silence are given."""

    retired: bool = False
    silent_s: float | None = 1.0

    def is_retired(self) -> bool:
        return self.retired

    def joiner_silent_s(self) -> float | None:
        return self.silent_s


@pytest.mark.parametrize(
    ("retired", "silent_s", "says"),
    [
        (False, 1.0, ""),
        (False, None, report.NO_JOINER),
        (False, 70.0, f"{report.NO_JOINER}; the last one fell silent 70 s ago"),
        (True, 1.0, report.RETIRED),
    ],
)
def test_why_no_connection_joins(*, retired: bool, silent_s: float | None, says: str) -> None:
    current = Joined(GENERATION.folder, retired, silent_s)
    assert report._joining_problem([current], current) == says
    assert report._joining_problem([], current) == ""
    status = replace(WELL, joining_problem=says).exit_status
    assert status == (exits.LESS if says else exits.WELL)


@pytest.mark.parametrize(
    ("file_s", "told_s", "is_hung"),
    [
        (3600, 3600.0, True),
        (None, 3600.0, True),
        (-3600, 3600.0, True),  # the clock was set back
        (None, None, False),  # a load has just made the generation
        (3600, 1.0, False),  # its file is on a full disk
        (1, 3600.0, False),  # too many passes have not ended
    ],
)
def test_whether_a_joiner_hangs(
    file_s: int | None, told_s: float | None, *, is_hung: bool, tmp_path: Path
) -> None:
    if file_s is not None:
        Passes().write(tmp_path)
        long_ago = time.time() - file_s
        os.utime(tmp_path / names.JOINER_JSON, (long_ago, long_ago))
    current = Joined(tmp_path, silent_s=told_s)
    assert joiner.is_hung(tmp_path, current) == is_hung


class Process:
    """A joiner's, that does nothing until it is killed."""

    pid = 7

    def __init__(self) -> None:
        self.killed = False

    def poll(self) -> None:
        return None

    def kill(self) -> None:
        self.killed = True

    def wait(self, _timeout_s: float) -> int:
        return -9


def test_a_joiner_that_hangs_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path / "bpffs", tmp_path / "state")
    node.bpffs.mkdir()
    (node.bpffs / "current").symlink_to("gen-1")
    settings = Settings(PLACES, Entry({}, {}), [], [], [], (), None, None, once=False)
    hung: Any = Process()
    other: Any = Process()
    agent = Agent(node, settings, Metrics(node), Health())
    monkeypatch.setattr("install.program.agent.agent.subprocess.Popen", lambda *_, **__: other)
    is_hung = False
    monkeypatch.setattr(joiner, "is_hung", lambda *_: is_hung)
    agent._joiner, agent._joiner_began = hung, -joiner.HUNG_S
    assert agent._keep_joiner()
    is_hung = True
    assert not agent._keep_joiner()
    assert hung.killed
    assert agent._joiner == other
    assert agent._keep_joiner()  # it has only just been started
    assert not other.killed
