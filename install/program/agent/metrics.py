# SPDX-License-Identifier: Apache-2.0
"""What Prometheus is told. Nothing is read before somebody asks, and then from kernel and files.

**Counters never go backwards, though what counts them does.** A pod's counters vanish with its
DEL, a generation's with its last connection. So this process adds up what the kernel's counters
*grow by* from one scrape to the next, starting with what they hold when it starts: like those of
any process, our counters begin at zero with the agent, and a rate over its restart is right. What
a pod counts between the last scrape and its DEL is missing from the sums, at most one scrape
interval of its traffic; `status` and the kernel are exact while the pod is there.

By default there are sums by hop only, some 200 series. Series per pod are the operator's to ask
for (`per_pod`): every pod that comes is some twenty more for Prometheus to keep.
"""

from __future__ import annotations

import itertools
import platform
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from bpf import abi, bpfsys, pins
from bpf.stats import HopCounters
from cni_plugin import names
from install.program import VERSION, freshness, log, report
from install.program.generations import Generation, opened
from install.program.node import Node
from install.program.passes import Passes
from install.program.report import Facts, Growth, Hops

REPAIRS = ("conflist", "plugin", "pins", "sandbox", "attachment")
PREFIX = "tcpip_bypass_"


class Metrics(Collector):
    """The node's metrics; every method may be called by any thread."""

    def __init__(self, node: Node, per_pod: bool = False) -> None:
        self._node = node
        self._per_pod = per_pod
        self._lock = threading.Lock()
        self._repaired = dict.fromkeys(REPAIRS, 0)
        self._failed = dict.fromkeys(REPAIRS, 0)
        self._switch_is_valid, self._switch_is_stop = True, False
        self._attach_errors = 0
        self._unreadable = ""  # why the node cannot be read
        self._failures: set[report.Failure] = set()
        self._growth: Growth | None = None  # until the node could be read
        self._total = {hop: _nothing(hop) for hop in abi.HOPS}
        self._pods: dict[tuple[str, ...], Hops] = {}  # by namespace and name
        self._update()
        self._build = InfoMetricFamily(
            f"{PREFIX}build",
            "What runs, on what",
            {
                "version": VERSION,
                "programs": freshness.version()[:12],
                "kernel": platform.release(),
            },
        )
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def repaired(self, what: str) -> None:
        """Count one thing, of REPAIRS, that was wrong and is right again."""
        with self._lock:
            self._repaired[what] += 1

    def failed(self, what: str) -> None:
        """Count one thing, of REPAIRS, that is wrong and could not be put right."""
        with self._lock:
            self._failed[what] += 1

    def set_switch(self, *, is_valid: bool, is_stop: bool) -> None:
        """What the cluster's switch says: whether it makes sense, and is a stop."""
        with self._lock:
            self._switch_is_valid, self._switch_is_stop = is_valid, is_stop

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry for each scrape."""
        with self._lock:
            found = self._update()
            yield _gauge("up", "1 when kernel and state folder could be read", found is not None)
            yield self._build
            if found:
                yield from _state(found)
            yield _gauge("switch_valid", "1 unless its ConfigMap is wrong", self._switch_is_valid)
            yield _gauge("switch_paused", "1 when it stops every node", self._switch_is_stop)
            yield _counter("repairs", "What the agent has put right", "what", self._repaired)
            yield _counter("repair_errors", "What it could not put right", "what", self._failed)
            attach_errors = CounterMetricFamily(
                f"{PREFIX}attach_errors", "ADDs after which a fault has kept a pod on TCP"
            )
            attach_errors.add_metric([], self._attach_errors)
            yield attach_errors
            yield from _passes(Passes.read(self._node.state_dir))
            yield from _traffic(PREFIX, {(): self._total})
            if self._per_pod:
                yield from _traffic(f"{PREFIX}pod_", self._pods, "namespace", "pod")

    def _update(self) -> Facts | None:
        """Adds what has come since the last time; None when the node cannot be read."""
        try:
            found = report.facts(self._node)
            pod_ids = {record.pod_id for record in found.attachments}
            if self._growth:
                pod_ids |= self._growth.pod_ids()
            reading = report.counters(found.generations, pod_ids)
        except OSError as error:
            if str(error) != self._unreadable:
                log.warning("scrape_failed", f"the node cannot be read: {error}", error=error)
            self._unreadable = str(error)
            return None
        if self._unreadable:
            log.info("scrape_recovered", f"this is over: {self._unreadable}")
        self._unreadable = ""
        failures = set(found.failures)
        if self._growth is None:
            self._growth = Growth(reading)
        else:
            self._attach_errors += len(failures - self._failures)
            self._add(self._growth.to(reading), found)
        self._failures = failures
        return found

    def _add(self, grown: dict[int, Hops], found: Facts) -> None:
        for hops in grown.values():
            report.add(self._total, hops)
        # One name may have two sandboxes for a while, and a later one after a while.
        owners = {
            record.pod_id: (record.pod_namespace, record.pod_name) for record in found.attachments
        }
        self._pods = {owner: self._pods.get(owner, {}) for owner in owners.values()}
        for pod_id, hops in grown.items():
            if pod_id in owners:
                report.add(self._pods[owners[pod_id]], hops)


def _nothing(hop: str) -> HopCounters:
    """Every series from the start, with zero: one that appears with 1 has no rate."""
    outcomes = abi.UNPAIRED if hop == abi.HOPS[0] else abi.PAIRED
    return HopCounters(
        tcp_messages=dict.fromkeys(abi.REASONS[1:], 0), connections=dict.fromkeys(outcomes, 0)
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}{name}", text, value)


def _gauges(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _counter(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}{name}", text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _state(found: Facts) -> Iterator[Metric]:
    yield _gauge("loaded", "1 when pods that start now find the programs", bool(found.current))
    yield _gauge("plugin_runs", "0 when the node cannot run the plugin", not found.plugin_problem)
    yield _gauge("joining", "0 when connections cannot join", not found.joining_problem)
    yield _gauge(
        "paused", "1 when an operator or the switch has sent all bytes to TCP", found.paused
    )
    alive = {record.pod_id for record in found.attachments}
    yield _gauge(
        "paused_pods",
        "Single pods whose bytes an operator or the switch has sent to TCP",
        len(found.paused_pods & alive),
    )
    yield _gauge(
        "generation",
        "Number of the current generation",
        found.current.number if found.current else 0,
    )
    yield _gauge(
        "generations", "Generations with pins, older ones included", len(found.generations)
    )
    modes = {mode: int(mode == found.mode) for mode in names.MODES}
    yield _gauges("mode", "1 for what the self-test allows", "mode", modes)
    attached = sum(record.pod_id in found.attached for record in found.attachments)
    pods = {
        "accelerated": attached,
        "lost": len(found.lost),
        "failed": len(found.failures),
    }
    yield _gauges("pods", "Pods accelerated, no longer so, or not for a fault", "state", pods)
    if found.current and (sockets := _sockets(found.current)):
        used, limit = sockets
        yield _gauge("sockets", "How many sockets are accelerated, by the current programs", used)
        yield _gauge("sockets_limit", "How many sockets can be accelerated at once", limit)


def _passes(done: Passes) -> Iterator[Metric]:
    """Of the joiner that runs now, or ran last: another one begins at zero."""
    for name, text, value in (
        ("passes", "Visits to all processes of a pod, in which sockets join or leave", done.passes),
        ("pass_cpu_seconds", "CPU time of all passes", done.cpu_ns / 1e9),
        ("pass_errors", "Passes that failed or took too long", done.failed),
    ):
        yield CounterMetricFamily(f"{PREFIX}{name}", text, value)
    yield _gauge("passes_stuck", "Passes that took too long and have not ended", done.hung)


def _sockets(generation: Generation) -> tuple[int, int] | None:
    """How many are in the sockhash, and how many fit.

    The kernel has no count: its keys are walked, 2 us each. A deletion sends the walk back to the
    start, which might never end while connections come and go fast: so many steps at most.
    """
    try:
        with opened(generation.folder / pins.SOCKHASH) as fd:
            lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
            facts = dict(line.split(":\t", 1) for line in lines)
            limit, key_size = int(facts["max_entries"]), int(facts["key_size"])
            keys = set(itertools.islice(bpfsys.map_keys(fd, key_size), limit))
    except FileNotFoundError:  # another load has just taken its place
        return None
    return len(keys), limit


def _traffic(prefix: str, rows: Mapping[tuple[str, ...], Hops], *labels: str) -> tuple[Metric, ...]:
    """Five families; `rows` are counters by the values of `labels`."""

    def family(name: str, text: str, last: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"{prefix}{name}", text, labels=[*labels, "hop", last])

    sizes = family("bytes", "Bytes sent by sockets that may bypass", "path")
    messages = family("messages", "Messages sent by sockets that may bypass", "path")
    reasons = family("tcp_messages", "Messages that went by TCP, and why", "reason")
    outcomes = family("connections", "Ends of connections, and what became of them", "outcome")
    changes = family(
        "socket_changes", "Sockets that joined the bypass, or left it while open", "change"
    )
    for values, hops in rows.items():
        for hop, counted in hops.items():
            at = [*values, hop]
            sizes.add_metric([*at, "bypass"], counted.bypassed_bytes)
            sizes.add_metric([*at, "tcp"], counted.tcp_bytes)
            messages.add_metric([*at, "bypass"], counted.bypassed_messages)
            messages.add_metric([*at, "tcp"], sum(counted.tcp_messages.values()))
            changes.add_metric([*at, "joined"], counted.joined)
            changes.add_metric([*at, "left"], counted.left)
            for reason, number in counted.tcp_messages.items():
                reasons.add_metric([*at, reason], number)
            for outcome, number in counted.connections.items():
                outcomes.add_metric([*at, outcome], number)
    return sizes, messages, reasons, outcomes, changes
