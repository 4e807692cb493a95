# SPDX-License-Identifier: Apache-2.0
"""Rules and dashboard, held against what /metrics really gives, and tried with promtool.

That an alert fires on its fault made for real is in tests/integration/test_alerts.py; here are the
faults that take hours, and those that a test had better not make.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cni_plugin import names
from install.program import report
from install.program.agent import metrics as exported
from install.program.agent.metrics import Metrics
from install.program.generations import Generation
from install.program.report import Facts
from tests.bed import promtool
from tests.bed.promtool import Scrapes
from tests.manifests import render
from tests.unit.test_agent_schedule import Node as RewrittenNode
from tests.unit.test_attachment import BLANK
from tests.unit.test_metrics import Kernel, make

DASHBOARD = json.loads(render.DASHBOARD.read_text())
PAGE = render.OPERATING.read_text()
OTHERS = {  # of cAdvisor and of Istio, for what we cannot measure ourselves
    "container_cpu_usage_seconds_total",
    "istio_requests_total",
}


class LoadedKernel(Kernel):
    """One where something is loaded, and one pod accelerated."""

    mode = "full"
    problem = ""

    def facts(self, _node: object) -> Facts:
        generation = Generation(Path("/no/gen-1"))
        record = BLANK._replace(pod_id=7)
        return Facts(
            *(generation, [generation], False, frozenset(), self.mode, ""),
            *([record], frozenset({7}), []),
            joining_problem=self.problem,
        )


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> LoadedKernel:
    made = LoadedKernel()
    monkeypatch.setattr(report, "facts", made.facts)
    monkeypatch.setattr(report, "counters", made.counters)
    monkeypatch.setattr(exported, "_sockets", lambda _: (5, 1000))
    return made


@pytest.fixture
def metrics(kernel: LoadedKernel) -> Metrics:  # noqa: ARG001 - it is what they read
    return make()


def text(metrics: Metrics) -> str:
    return metrics.render().decode()


def firing(*history: Scrapes) -> set[str]:
    return promtool.firing(render.RULES, history)


def changed(text: str, metric: str, value: float, label: str = "") -> str:
    """The text with another value for the samples of a metric (that have this label's value)."""
    labels = rf'\{{[^}}]*"{label}"[^}}]*\}}' if label else ""
    new, count = re.subn(rf"^({metric}{labels}) \S+$", rf"\g<1> {value}", text, flags=re.M)
    assert count
    return new


def test_promtool_takes_the_rules() -> None:
    promtool.check(render.RULES)


def test_promtool_takes_the_dashboards_expressions() -> None:
    promtool.check_expressions(dashboard_expressions())


def dashboard_expressions() -> list[str]:
    """With Grafana's variables filled in."""
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    others = [each["expr"] for each in DASHBOARD["annotations"]["list"]]
    return [each.replace("$instance", ".*") for each in (*panels, *others)]


def test_expressions_select_what_there_is(metrics: Metrics) -> None:
    """Each metric, and each label with a value that a sample has (or, for !=, has another of)."""
    found = promtool.samples(text(metrics))
    expressions = [*dashboard_expressions(), *(rule["expr"] for rule in render.rules())]
    asked = [each for expression in expressions for each in promtool.selectors(expression)]
    ours = [(name, labels) for name, labels in asked if name.startswith(("tcpip_", "process_"))]
    assert len(ours) > 30
    for name, labels in ours:
        own = {key: how for key, how in labels.items() if key not in ("instance", "pod")}
        assert any(
            sample == name and all(matches(dict(at).get(key), *how) for key, how in own.items())
            for sample, at in found
        ), (name, labels)
    others = {name for name, _ in asked} - {name for name, _ in found}
    assert {name for name in others if name.endswith("_total")} == OTHERS


def matches(value: str | None, how: str, wanted: str) -> bool:
    assert how in ("=", "!=")
    return value is not None and (value == wanted) == (how == "=")


def test_variables_and_legends_name_labels_that_there_are() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert label == "instance" or re.search(rf"by \([^)]*\b{label}\b", target["expr"])
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_each_rule_says_how_bad_it_is_and_links_to_its_row() -> None:
    for rule in render.rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        told = rule["annotations"]
        assert told.keys() == {"summary", "description", "runbook_url"}
        page, _, anchor = told["runbook_url"].partition("#")
        assert page == "docs/operating.md"
        assert f'<a id="{anchor}"></a>`{rule["alert"]}`' in PAGE


def test_nothing_fires_while_all_is_well(metrics: Metrics) -> None:
    assert firing(Scrapes(800, text(metrics))) == set()


def test_an_agent_that_does_not_answer(metrics: Metrics) -> None:
    well = Scrapes(30, text(metrics))
    assert firing(well, Scrapes(14, None)) - {"TcpipBypassAbsent"} == set()
    assert firing(well, Scrapes(30, None)) == {"TcpipBypassAgentDown", "TcpipBypassAbsent"}
    assert firing(well, Scrapes(30, None), well) == set()


def test_no_agent_at_all(metrics: Metrics) -> None:
    """Its DaemonSet is gone, and so is the target."""
    assert firing(Scrapes(30, text(metrics)), Scrapes(30, None, is_there=False)) == {
        "TcpipBypassAbsent"
    }


def test_a_node_that_cannot_be_read(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    well = text(metrics)

    def broken(_node: object) -> Facts:
        raise OSError("not today")

    monkeypatch.setattr(report, "facts", broken)
    assert firing(Scrapes(30, well), Scrapes(30, text(metrics))) == {"TcpipBypassNotLoaded"}


def test_an_unfit_kernel(kernel: LoadedKernel, metrics: Metrics) -> None:
    kernel.mode = "off"
    assert firing(Scrapes(30, text(metrics))) == {"TcpipBypassKernelUnfit"}
    for mode in names.MODES[:2]:
        kernel.mode = mode
        assert firing(Scrapes(30, text(metrics))) == set()


def test_a_node_where_nothing_joins(kernel: LoadedKernel, metrics: Metrics) -> None:
    kernel.problem = report.NO_JOINER
    assert firing(Scrapes(30, text(metrics))) == {"TcpipBypassNotJoining"}


def test_the_clusters_switch(metrics: Metrics) -> None:
    metrics.set_switch(is_valid=True, is_stop=True)
    paused = changed(text(metrics), "tcpip_bypass_paused", 1)
    assert firing(Scrapes(600, paused)) == set()
    assert firing(Scrapes(800, paused)) == {"TcpipBypassClusterPaused"}
    metrics.set_switch(is_valid=False, is_stop=False)
    assert firing(Scrapes(30, text(metrics))) == {"TcpipBypassSwitchWrong"}


def test_a_conflist_that_was_rewritten_for_a_while(metrics: Metrics) -> None:
    node = RewrittenNode([1 + number / 5 for number in range(50)])
    node.live(3600)
    by_minute = [sum(at <= 60 * minute for at in node.repairs) for minute in range(60)]
    name = "tcpip_bypass_repairs_total"
    for minutes in (5, 20, 40):
        found = [
            Scrapes(1, changed(text(metrics), name, count, "conflist"))
            for count in by_minute[:minutes]
        ]
        assert firing(*found) == set()


def test_repairs_that_fail(metrics: Metrics) -> None:
    """As often as a load is tried that never works: after 5 s, then later and later."""
    name, tries, pause, at = "tcpip_bypass_repair_errors_total", list[float](), 5.0, 0.0
    while at < 7200:
        tries.append(at)
        at, pause = at + pause, min(2 * pause, 600.0)
    by_minute = [sum(each <= 60 * minute for each in tries) for minute in range(120)]
    failing = [Scrapes(1, changed(text(metrics), name, count, "pins")) for count in by_minute]
    assert firing(*failing) == {"TcpipBypassRepairsFail"}
    once = changed(text(metrics), name, 2, "pins")
    assert firing(Scrapes(30, text(metrics)), Scrapes(45, once)) == set()


def test_maps_that_are_full(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    well = text(metrics)
    full = changed(well, "tcpip_bypass_connections_total", 3, "full")
    assert firing(Scrapes(30, well), Scrapes(5, full)) == {"TcpipBypassFull"}
    assert firing(Scrapes(30, well), Scrapes(30, full)) == set()
    monkeypatch.setattr(exported, "_sockets", lambda _: (950, 1000))
    assert firing(Scrapes(30, text(metrics))) == {"TcpipBypassAlmostFull"}
