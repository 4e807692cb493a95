# SPDX-License-Identifier: Apache-2.0
"""`kubectl tcpip-bypass` against a kubectl that answers with what real nodes have said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from install.program import report
from tests.unit.cases import ROOT
from tests.unit.test_check import WELL

PROGRAM = ROOT / "install" / "kubectl-tcpip_bypass"
RECORDED = Path(__file__).with_name("kubectl")
ARGUMENTS = [
    *("agent", "--listen=:15099", "--cri-socket=/run/cri/containerd.sock"),
    *("--host-proc", "/host/proc", "--state-dir=/run/other"),
]

Rule = dict[str, Any]


def agent_pod(node: str, *, ready: bool = True) -> dict[str, Any]:
    return {
        "metadata": {"name": f"agent-{node}", "namespace": "kube-system"},
        "spec": {"nodeName": node, "containers": [{"name": "agent", "args": ARGUMENTS}]},
        "status": {"conditions": [{"type": "Ready", "status": str(ready)}]},
    }


def app_pod(name: str, **spec: object) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "shop"}, "spec": spec}


def rule(*words: str, **answer: object) -> Rule:
    return {"words": words, "answers": [answer]}


def recorded(name: str) -> str:
    return str(RECORDED / f"{name}.json")


def of_node(node: str, command: str, *names: str, exit_status: int = 1) -> Rule:
    """What a node says to a command; of several answers, one after the other."""
    return {
        "words": ["exec", f"agent-{node}", command],
        "answers": [{"file": recorded(name), "exit": exit_status} for name in names],
    }


@dataclass(frozen=True)
class Answer:
    status: int
    said: str
    complained: str


@dataclass(frozen=True)
class Cluster:
    """Rules of the fake kubectl, and the folder in which it stands."""

    folder: Path

    def call(self, rules: list[Rule], *arguments: str) -> Answer:
        (self.folder / "answers.json").write_text(json.dumps(rules))
        done = subprocess.run(
            [sys.executable, "-I", PROGRAM, *arguments],
            env={"PATH": f"{self.folder}:{os.environ['PATH']}", "FAKE": str(self.folder)},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Answer(done.returncode, done.stdout, done.stderr)

    def calls(self) -> list[list[str]]:
        """Every call of kubectl, in order."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [json.loads(line)[1] for line in lines]


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    (tmp_path / "kubectl").symlink_to(RECORDED / "fake")
    return Cluster(tmp_path)


def nodes(*names: str, ready: bool = True) -> Rule:
    items = [agent_pod(name, ready=ready) for name in names]
    return rule("get", "pods", "kube-system", text=json.dumps({"items": items}))


def table(text: str) -> list[list[str]]:
    """Lines as cells, which stand two blanks apart."""
    return [[cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines()]


def test_the_recordings_are_of_this_version() -> None:
    now = report.as_json(replace(WELL, current=None, generations=[], attachments=[]))
    for path in RECORDED.glob("status-*.json"):
        assert json.loads(path.read_text()).keys() == now.keys()


def test_status_of_all_nodes(cluster: Cluster) -> None:
    rules = [
        nodes("c", "a", "b", "d"),
        of_node("a", "status", "status-two"),
        of_node("b", "status", "status-paused"),
        of_node("c", "status", "status-unloaded"),
        rule("exec", "agent-d", stderr="error: connection refused\n", exit=1),
    ]
    answer = cluster.call(rules, "status")
    print(answer.said)
    head, *rows = table(answer.said)
    assert head[:5] == ["NODE", "STATE", "MODE", "PODS", "LOST"]
    assert [row[:5] for row in rows[:3]] == [
        ["a", "loaded", "full, forced", "2", "0"],
        ["b", "paused", "full, forced", "2", "0"],
        ["c", "not loaded", "off", "0", "0"],
    ]
    assert rows[0][6].endswith("%")
    assert rows[1][5] == "1"  # failed
    assert rows[3][0] == "d"
    assert "connection refused" in rows[3][1]
    assert answer.status == 2
    paused = [nodes("a", ready=False), of_node("a", "status", "status-paused")]
    answer = cluster.call(paused, "status", "--json")
    assert (answer.status, json.loads(answer.said)[0]["paused"]) == (1, True)
    assert "agent not ready" in cluster.call(paused, "status").said


@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize(
    "facts",
    [
        WELL,
        replace(WELL, plugin_problem="the node cannot run the plugin: noexec"),
        replace(WELL, mode="proxy-only", forced="full"),
        replace(WELL, lost_answers=3),
        replace(WELL, generations=[]),
        replace(WELL, mode="off"),
    ],
)
def test_status_exits_as_the_nodes_own(
    cluster: Cluster, facts: report.Facts, options: tuple[str, ...]
) -> None:
    text = json.dumps(report.as_json(facts))
    rules = [nodes("a"), rule("exec", "agent-a", "status", text=text, exit=facts.exit_status)]
    answer = cluster.call(rules, "status", *options)
    assert answer.status == facts.exit_status
    if not options:
        assert ("plugin does not run" in answer.said) == bool(facts.plugin_problem)


def test_status_exits_by_the_worst_node(cluster: Cluster) -> None:
    def of_nodes(*statuses: int) -> list[Rule]:
        names = [f"node-{number}" for number in range(len(statuses))]
        said = zip(names, statuses, strict=True)
        exits = [of_node(name, "status", "status-two", exit_status=each) for name, each in said]
        return [nodes(*names), *exits]

    for statuses in ((0, 0), (0, 1), (2, 1), (0, 137)):  # the last one was killed
        assert cluster.call(of_nodes(*statuses), "status").status == min(max(statuses), 2)


@pytest.mark.parametrize(
    ("by", "state"),
    [
        (["switch"], "paused by the switch"),
        (["operator"], "paused"),
        (["operator", "switch"], "paused"),
        (None, "paused"),  # an agent of an older version
    ],
)
def test_a_pause_by_the_switch_is_told_from_an_operators(
    cluster: Cluster, by: list[str] | None, state: str
) -> None:
    found = json.loads((RECORDED / "status-two.json").read_text())

    def said() -> str:
        rules = [nodes("a"), rule("exec", "agent-a", "status", text=json.dumps(found))]
        return table(cluster.call(rules, "status").said)[1][1]

    assert said() == "loaded"
    found["pods"][0] |= {"paused": True, "paused_by": by} if by else {"paused": True}
    if not by:
        del found["pods"][0]["paused_by"]
    assert said() == f"pods {state}"
    found |= {"paused": True, "paused_by": by}
    if not by:
        del found["paused_by"]
    assert said() == state


def test_a_node_where_nothing_joins(cluster: Cluster) -> None:
    found = json.loads((RECORDED / "status-two.json").read_text())
    found["joining_problem"] = report.NO_JOINER
    rules = [nodes("a"), rule("exec", "agent-a", "status", text=json.dumps(found))]
    assert table(cluster.call(rules, "status").said)[1][1] == "loaded, nothing joins"


def test_a_pod_that_is_gone_is_not_lost(cluster: Cluster) -> None:
    found = json.loads((RECORDED / "status-two.json").read_text())
    for gone, lost in ((True, "0"), (False, "1")):
        found["pods"][0] |= {"attached": False, "gone": gone}
        rules = [nodes("a"), rule("exec", "agent-a", "status", text=json.dumps(found))]
        assert table(cluster.call(rules, "status").said)[1][4] == lost


def test_only_get_and_exec_are_used(cluster: Cluster) -> None:
    rules = [
        nodes("a"),
        rule("get", "pod", "cart-1", text=json.dumps(app_pod("cart-1", nodeName="a"))),
        of_node("a", "status", "status-one", "status-two"),
        of_node("a", "check", "check"),
        rule("exec", "pause", text=""),
        rule("exec", "bugreport", text="tar"),
    ]
    cluster.call(rules, "status", "--context", "prod")
    cluster.call(rules, "top", "--seconds", "0.1")
    cluster.call(rules, "explain", "cart-1", "-n", "shop")
    cluster.call(rules, "pause", "--all-nodes")
    cluster.call(rules, "bugreport", "--node", "a")
    calls = cluster.calls()
    verbs = {next(each for each in call if each in ("get", "exec")) for call in calls}
    assert verbs == {"get", "exec"}
    assert len(calls) == 2 + 3 + 4 + 2 + 2
    assert calls[0][0] == "--context=prod"
    # The agent's own places are told to the commands that take them.
    (check,) = [call for call in calls if "check" in call]
    assert check[-3:] == [
        "--cri-socket=/run/cri/containerd.sock",
        "--host-proc=/host/proc",
        "--state-dir=/run/other",
    ]
    (pause,) = [call for call in calls if "pause" in call]
    assert pause[-2:] == ["pause", "--state-dir=/run/other"]


def test_top_is_sorted_by_what_was_sent_meanwhile(cluster: Cluster) -> None:
    rules = [nodes("a"), of_node("a", "status", "status-one", "status-two")]
    answer = cluster.call(rules, "top", "--seconds", "0.2")
    head, first, second = table(answer.said)
    assert head[0] == "NAMESPACE"
    rates = [float(row[3]) + float(row[4]) for row in (first, second)]
    assert rates[0] >= rates[1] > 0
    assert {first[1], second[1]} == {"cart-1", "reviews-1"}
    assert answer.status == 0
    # A pod whose counters began anew is not negative.
    rules = [nodes("b"), of_node("b", "status", "status-two", "status-one")]
    answer = cluster.call(rules, "top", "--seconds", "0.1", "--rows", "1")
    assert len(table(answer.said)) == 2
    assert "-" not in table(answer.said)[1][3]


def test_explain(cluster: Cluster) -> None:
    rules = [
        nodes("a", "b"),
        rule("get", "pod", "reviews-1", text=json.dumps(app_pod("reviews-1", nodeName="b"))),
        rule("get", "pod", "cart", text=json.dumps(app_pod("cart", nodeName="b"))),
        rule("get", "pod", "web", text=json.dumps(app_pod("web", nodeName="b"))),
        rule("get", "pod", "proxy", text=json.dumps(app_pod("proxy", hostNetwork=True))),
        rule("get", "pod", "new", text=json.dumps(app_pod("new"))),
        rule("get", "pod", "far", text=json.dumps(app_pod("far", nodeName="z"))),
        of_node("b", "check", "check"),
        of_node("b", "status", "status-paused"),
    ]
    answer = cluster.call(rules, "explain", "reviews-1")
    assert answer.status == 1
    assert "shop/reviews-1 on node b" in answer.said
    assert "paused: the node is paused" in answer.said
    assert "hop sidecars: " in answer.said
    assert "of the bytes bypassed" in answer.said
    assert "failed: CgroupNotFound" in cluster.call(rules, "explain", "cart").said
    assert "the node knows no such sandbox" in cluster.call(rules, "explain", "web").said
    assert "uses its node's network" in cluster.call(rules, "explain", "proxy").said
    for pod, why in (("new", "is on no node yet"), ("far", "no agent"), ("gone", "NotFound")):
        answer = cluster.call(rules, "explain", pod)
        assert (answer.status, answer.said) == (2, "")
        assert why in answer.complained


def test_explain_says_what_to_do_about_connections_that_did_not_fit(cluster: Cluster) -> None:
    found = json.loads((RECORDED / "status-two.json").read_text())
    (pod,) = [each for each in found["pods"] if each["name"] == "reviews-1"]

    def said() -> str:
        rules = [
            nodes("b"),
            rule("get", "pod", "reviews-1", text=json.dumps(app_pod("reviews-1", nodeName="b"))),
            of_node("b", "check", "check"),
            rule("exec", "agent-b", "status", text=json.dumps(found)),
        ]
        return cluster.call(rules, "explain", "reviews-1").said

    assert "mismatch" not in said()
    pod["hops"]["none"]["connections"] = {"no_peer": 1, "mismatch": 3}
    pod["advice"] = report.OLD_LISTENER
    assert "connections on TCP: 3 mismatch, 1 no_peer" in said()
    (advice,) = [line for line in said().splitlines() if line.startswith("  mismatch: ")]
    assert "before its pod was taken in: restart it" in advice
    assert advice.endswith("docs/operating.md#metrics")


@pytest.mark.parametrize("command", ["pause", "resume"])
def test_pause_and_resume(cluster: Cluster, command: str) -> None:
    rules = [
        nodes("a", "b"),
        rule("get", "pod", "cart-1", text=json.dumps(app_pod("cart-1", nodeName="b"))),
        rule("exec", "agent-a", command, text=""),
        rule("exec", "agent-b", command, "--pod", "shop/cart-1", text=""),
        rule("exec", "agent-b", command, stderr="error: nothing is loaded\n", exit=1),
    ]
    answer = cluster.call(rules, command, "--all-nodes")
    assert answer.status == 1
    assert answer.said.splitlines()[0] == f"a: {command}d"
    assert "b: tcpip-bypass-node" in answer.said
    assert "nothing is loaded" in answer.said
    assert cluster.call(rules, command, "--node", "a").status == 0
    answer = cluster.call(rules, command, "cart-1")
    assert (answer.status, answer.said) == (0, f"shop/cart-1 on b: {command}d\n")
    before = len(cluster.calls())
    for wrong in ((), ("--all-nodes", "--node", "a"), ("cart-1", "--all-nodes")):
        answer = cluster.call(rules, command, *wrong)
        assert answer.status == 2
        assert "--all-nodes" in answer.complained
    assert len(cluster.calls()) == before
    assert "no agent on node z" in cluster.call(rules, command, "--node", "z").complained


def test_bugreport(cluster: Cluster) -> None:
    rules = [
        nodes("a", "b"),
        rule("get", "pod", "cart-1", text=json.dumps(app_pod("cart-1", nodeName="b"))),
        rule("exec", "agent-a", "bugreport", "--output", "-", text="archive of a"),
        rule("exec", "agent-b", "bugreport", "--pod", "shop/cart-1", text="archive of b"),
        rule("exec", "agent-b", "bugreport", stderr="error: no space\n", exit=1),
    ]
    answer = cluster.call(rules, "bugreport", "--all-nodes")
    assert answer.status == 1
    assert (cluster.folder / "tcpip-bypass-a.tar.gz").read_text() == "archive of a"
    assert "no space" in answer.complained
    assert not (cluster.folder / "tcpip-bypass-b.tar.gz").exists()
    assert cluster.call(rules, "bugreport", "cart-1").status == 0
    assert (cluster.folder / "tcpip-bypass-b.tar.gz").read_text() == "archive of b"


def test_a_cluster_without_us_and_a_machine_without_kubectl(cluster: Cluster) -> None:
    answer = cluster.call([rule("get", "pods", text='{"items": []}')], "status")
    assert answer.status == 2
    assert "is it installed?" in answer.complained
    (cluster.folder / "kubectl").unlink()
    done = subprocess.run(
        [sys.executable, "-I", PROGRAM, "status"],
        env={"PATH": str(cluster.folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, "kubectl is not in PATH" in done.stderr) == (2, True)
