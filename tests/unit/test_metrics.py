# SPDX-License-Identifier: Apache-2.0
"""Sums that only grow, while pods, generations and sandboxes come and go."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from bpf import abi, bpfsys, stats
from bpf.stats import HopCounters
from install.program import VERSION, freshness, report
from install.program.agent.metrics import REPAIRS, Metrics
from install.program.generations import Generation
from install.program.node import Node
from install.program.report import Facts, Failure, Growth, Reading
from tests.unit.test_attachment import BLANK

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
BYTES = "tcpip_bypass_bytes_total"
POD_BYTES = "tcpip_bypass_pod_bytes_total"


def inbound(size: int, **more: Any) -> dict[str, HopCounters]:
    return {"inbound": HopCounters(bypassed_bytes=size, **more)}


@dataclass
class Kernel:
    """What report.facts() and report.counters() find; a pod that is not asked for is not told."""

    reading: Reading = field(default_factory=dict)
    pods: dict[int, str] = field(default_factory=dict)  # names, by the ID in the pod's record
    failures: list[Failure] = field(default_factory=list)
    broken: bool = False

    def facts(self, _node: Node) -> Facts:
        if self.broken:
            raise PermissionError(13, "not today")
        records = [BLANK._replace(pod_id=i, pod_name=name) for i, name in self.pods.items()]
        attached = frozenset(self.pods)
        return Facts(
            None, [], False, frozenset(), "full", "", records, attached, list(self.failures), ""
        )

    def counters(self, _generations: object, pod_ids: set[int]) -> Reading:
        return {key: hops for key, hops in self.reading.items() if key[1] in pod_ids}


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(report, "facts", made.facts)
    monkeypatch.setattr(report, "counters", made.counters)
    return made


def make(*, per_pod: bool = False) -> Metrics:
    return Metrics(Node(Path("/no/bpffs"), Path("/no/state")), per_pod)


def series(metrics: Metrics) -> Series:
    """All samples, by name and labels; a series that is there twice is an error to Prometheus."""
    found: Series = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, key
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return series(metrics).get((name, frozenset(labels.items())))


def bypassed(metrics: Metrics) -> float | None:
    return value(metrics, BYTES, hop="inbound", path="bypass")


def test_counting_starts_with_the_agent(kernel: Kernel) -> None:
    kernel.pods = {7: "cart"}
    kernel.reading = {(1, 7): inbound(10**9)}
    metrics = make()
    assert bypassed(metrics) == 0
    kernel.reading = {(1, 7): inbound(10**9 + 5)}
    assert bypassed(metrics) == 5
    assert bypassed(metrics) == 5


def test_a_new_pod_counts_in_full_and_a_gone_one_stays_counted(kernel: Kernel) -> None:
    metrics = make()
    kernel.pods, kernel.reading = {7: "cart"}, {(1, 7): inbound(100)}
    assert bypassed(metrics) == 100
    kernel.pods, kernel.reading = {8: "shop"}, {(1, 8): inbound(7)}
    assert bypassed(metrics) == 107
    kernel.pods, kernel.reading = {}, {}
    assert bypassed(metrics) == 107


def test_a_pod_moves_to_another_generation(kernel: Kernel) -> None:
    metrics = make()
    kernel.pods, kernel.reading = {7: "cart"}, {(1, 7): inbound(100)}
    assert bypassed(metrics) == 100
    kernel.reading = {(1, 7): inbound(110), (2, 7): inbound(3)}
    assert bypassed(metrics) == 113
    kernel.reading = {(2, 7): inbound(4)}
    assert bypassed(metrics) == 114


def test_counters_made_anew_count_from_zero(kernel: Kernel) -> None:
    """DEL and ADD of the same attachment between two scrapes."""
    metrics = make()
    kernel.pods = {7: "cart"}
    kernel.reading = {(1, 7): inbound(100, connections={"paired": 2})}
    assert bypassed(metrics) == 100
    kernel.reading = {(1, 7): inbound(120, connections={"paired": 1})}
    assert bypassed(metrics) == 220
    assert value(metrics, "tcpip_bypass_connections_total", hop="inbound", outcome="paired") == 3


def test_a_record_that_cannot_be_read_for_a_while_is_not_counted_twice(kernel: Kernel) -> None:
    metrics = make()
    kernel.pods, kernel.reading = {7: "cart"}, {(1, 7): inbound(100)}
    assert bypassed(metrics) == 100
    kernel.pods = {}
    assert bypassed(metrics) == 100
    kernel.pods = {7: "cart"}
    assert bypassed(metrics) == 100


def test_a_node_that_cannot_be_read_keeps_its_sums(
    kernel: Kernel, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics = make()
    kernel.pods, kernel.reading = {7: "cart"}, {(1, 7): inbound(100)}
    assert (bypassed(metrics), value(metrics, "tcpip_bypass_up")) == (100, 1)
    kernel.broken = True
    assert (bypassed(metrics), value(metrics, "tcpip_bypass_up")) == (100, 0)
    assert value(metrics, "tcpip_bypass_loaded") is None
    assert capfd.readouterr().err.count("not today") == 1
    kernel.broken = False
    assert (bypassed(metrics), value(metrics, "tcpip_bypass_up")) == (100, 1)
    assert "this is over: [Errno 13] not today" in capfd.readouterr().err


def test_a_node_that_cannot_be_read_at_first(kernel: Kernel) -> None:
    """What was there before is not counted as new once it can be read."""
    kernel.broken = True
    kernel.pods, kernel.reading = {7: "cart"}, {(1, 7): inbound(10**9)}
    metrics = make()
    assert bypassed(metrics) == 0
    kernel.broken = False
    assert bypassed(metrics) == 0
    kernel.reading = {(1, 7): inbound(10**9 + 1)}
    assert bypassed(metrics) == 1


def test_two_sandboxes_of_one_name_are_one_series(kernel: Kernel) -> None:
    """While a sandbox is made anew, and when a StatefulSet's pod comes back."""
    metrics = make(per_pod=True)
    cart = {"namespace": "", "pod": "cart", "hop": "inbound", "path": "bypass"}
    kernel.pods, kernel.reading = {7: "cart"}, {(1, 7): inbound(100)}
    assert value(metrics, POD_BYTES, **cart) == 100
    kernel.pods = {7: "cart", 8: "cart"}
    kernel.reading = {(1, 7): inbound(100), (1, 8): inbound(1)}
    assert value(metrics, POD_BYTES, **cart) == 101
    kernel.pods, kernel.reading = {8: "cart"}, {(1, 8): inbound(2)}
    assert value(metrics, POD_BYTES, **cart) == 102
    kernel.pods, kernel.reading = {}, {}
    assert value(metrics, POD_BYTES, **cart) is None


def test_series_per_pod_are_asked_for(kernel: Kernel) -> None:
    metrics = make()
    kernel.pods, kernel.reading = {7: "cart"}, {(1, 7): inbound(100)}
    found = series(metrics)
    assert not any("pod" in dict(labels) for _, labels in found)
    kernel.pods = {number: f"pod-{number}" for number in range(1, 200)}
    kernel.reading = {(1, number): inbound(1) for number in kernel.pods}
    assert len(series(metrics)) == len(found)


@pytest.mark.usefixtures("kernel")
def test_every_series_is_there_from_the_start() -> None:
    found = series(make())
    names = {name for name, _ in found}
    assert {BYTES, "tcpip_bypass_attach_errors_total", "process_resident_memory_bytes"} <= names
    reasons = [dict(labels) for name, labels in found if name == "tcpip_bypass_tcp_messages_total"]
    assert len(reasons) == len(abi.HOPS) * (len(abi.REASONS) - 1)
    outcomes = [dict(labels) for name, labels in found if name == "tcpip_bypass_connections_total"]
    assert len(outcomes) == (len(abi.HOPS) - 1) * len(abi.PAIRED) + len(abi.UNPAIRED)
    for sample in reasons:
        assert found["tcpip_bypass_tcp_messages_total", frozenset(sample.items())] == 0


def test_messages_by_tcp_are_the_sum_of_their_reasons(kernel: Kernel) -> None:
    metrics = make()
    kernel.pods = {7: "cart"}
    kernel.reading = {
        (1, 7): inbound(0, bypassed_messages=4, tcp_messages={"order": 3, "leaving": 2})
    }
    messages = "tcpip_bypass_messages_total"
    assert value(metrics, messages, hop="inbound", path="tcp") == 5
    assert value(metrics, messages, hop="inbound", path="bypass") == 4
    assert value(metrics, "tcpip_bypass_tcp_messages_total", hop="inbound", reason="order") == 3


@pytest.mark.usefixtures("kernel")
def test_what_runs() -> None:
    (labels,) = (dict(at) for name, at in series(make()) if name == "tcpip_bypass_build_info")
    assert labels["version"] == VERSION
    assert labels["kernel"] == platform.release()
    assert freshness.version().startswith(labels["programs"])
    assert len(labels["programs"]) == 12


@pytest.mark.usefixtures("kernel")
def test_repairs() -> None:
    metrics = make()
    for what in REPAIRS:
        metrics.repaired(what)
        assert value(metrics, "tcpip_bypass_repairs_total", what=what) == 1
    metrics.failed("pins")
    assert value(metrics, "tcpip_bypass_repair_errors_total", what="pins") == 1
    assert value(metrics, "tcpip_bypass_repair_errors_total", what="conflist") == 0
    with pytest.raises(KeyError):
        metrics.repaired("an unknown thing")


@pytest.mark.usefixtures("kernel")
def test_the_clusters_switch() -> None:
    metrics = make()
    valid, paused = "tcpip_bypass_switch_valid", "tcpip_bypass_switch_paused"
    assert (value(metrics, valid), value(metrics, paused)) == (1, 0)
    metrics.set_switch(is_valid=False, is_stop=True)
    assert (value(metrics, valid), value(metrics, paused)) == (0, 1)


def test_attach_errors_count_each_failure_once(kernel: Kernel) -> None:
    old = Failure("c1", "eth0", "shop", "cart", "CgroupNotFound: ...", 1)
    kernel.failures = [old]
    metrics = make()
    name = "tcpip_bypass_attach_errors_total"
    assert value(metrics, name) == 0
    new = Failure("c2", "eth0", "shop", "cart", "CgroupNotFound: ...", 2)
    kernel.failures = [old, new]
    assert (value(metrics, name), value(metrics, name)) == (1, 1)
    assert value(metrics, "tcpip_bypass_pods", state="failed") == 2
    kernel.failures = []
    assert value(metrics, name) == 1
    assert value(metrics, "tcpip_bypass_pods", state="failed") == 0


numbers = st.integers(0, 3)
readings = st.dictionaries(
    st.tuples(st.integers(1, 2), st.integers(7, 9)),
    st.builds(
        lambda size, count: inbound(size, connections={"paired": count} if count else {}),
        numbers,
        numbers,
    ),
)


@settings(max_examples=300)
@given(st.lists(readings, min_size=1))
def test_growth_is_never_negative(found: list[Reading]) -> None:
    growth = Growth(found[0])
    for reading in found[1:]:
        for hops in growth.to(reading).values():
            for counted in hops.values():
                assert counted.bypassed_bytes >= 0
                assert all(count >= 0 for count in counted.connections.values())


@given(st.lists(numbers, min_size=1))
def test_growth_adds_up_to_what_was_counted(steps: list[int]) -> None:
    """As long as the counters are only added to."""
    growth, total, seen = Growth({}), 0, 0
    for step in steps:
        total += step
        for hops in growth.to({(1, 7): inbound(total)}).values():
            seen += hops["inbound"].bypassed_bytes
    assert seen == total


@pytest.mark.parametrize("more", [0, 8, -8])
def test_another_versions_counters_are_left_out(monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    """The kernel writes as much as that version's struct has, whatever room there is."""
    size = ctypes.sizeof(abi.Counters)
    found = bpfsys.Map(7, 5, "counters", ctypes.sizeof(abi.CounterKey), size + more)
    monkeypatch.setattr(report, "opened", contextlib.nullcontext)
    monkeypatch.setattr(bpfsys, "map_info", lambda _map: found)
    monkeypatch.setattr(bpfsys, "map_lookup", lambda _map, _key, _size: bytes(_size))
    monkeypatch.setattr(stats, "possible_cpus", lambda: 2)
    reading = report.counters([Generation(Path("gen-1"))], [3])
    assert list(reading) == ([] if more else [(7, 3)])
