# SPDX-License-Identifier: Apache-2.0
"""`compare`: what the bypass brings here, by pausing and resuming it a few times.

For each phase: the CPU time of the accelerated pods' cgroups, and the bytes that their sockets have
sent, by TCP (sock_diag) or past it (our counters). Phases come in pairs, one paused and one not, in
turn first and second, so that a load which grows or falls hits both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from cni_plugin import policy
from cni_plugin.state import Attachment
from install.program import VERSION, log, pauses, report
from install.program.estimate.pods import Pod
from install.program.estimate.survey import LOOK_S, Survey
from install.program.intervals import Interval, bootstrap_median
from install.program.node import Node, NodeError

PAIRS = 6
SETTLE_S = 1.0  # after a switch: directions change their path when what lies unread was read
SHORTEST_PHASE_S = 1.0


class Interrupted(Exception):
    """A signal has come."""


@dataclass(frozen=True)
class Phase:
    """What the pods used and sent in a stretch of time."""

    paused: bool
    seconds: float
    cpu_s: float
    bypassed_bytes: int
    tcp_bytes: int

    @property
    def bytes(self) -> int:
        return self.bypassed_bytes + self.tcp_bytes

    @property
    def cpu_per_byte(self) -> float:
        """In seconds; only of a phase in which something was sent."""
        return self.cpu_s / self.bytes


@dataclass(frozen=True)
class Comparison:
    """All phases, in pairs of (paused, not paused)."""

    pods: int
    pairs: list[tuple[Phase, Phase]]

    @property
    def cpu_per_byte(self) -> Interval:
        """Not paused to paused: below 1, the bypass takes less CPU."""
        return bootstrap_median([on.cpu_per_byte / off.cpu_per_byte for off, on in self.pairs])

    @property
    def bytes_per_second(self) -> Interval:
        return bootstrap_median(
            [(on.bytes / on.seconds) / (off.bytes / off.seconds) for off, on in self.pairs]
        )


def run(node: Node, host_proc: Path, arguments: argparse.Namespace) -> int:
    """Prints the comparison; returns the exit status. Raises NodeError, OSError."""
    length = arguments.seconds / (2 * PAIRS) - SETTLE_S
    if length < SHORTEST_PHASE_S:
        least = 2 * PAIRS * (SETTLE_S + SHORTEST_PHASE_S)
        raise NodeError(f"--seconds must be at least {least:.0f}: {2 * PAIRS} phases have to fit")
    records = _accelerated(node)
    with pausing(node) as set_paused:
        found = measure(Meter(node, records, host_proc), set_paused, length)
    if arguments.json:
        print(json.dumps(as_json(found), indent=1))
    else:
        print("\n".join(lines(found)))
    return 0


def _accelerated(node: Node) -> list[Attachment]:
    facts = report.facts(node)
    if facts.current is None:
        raise NodeError(f"nothing is loaded below {node.bpffs}; run tcpip-bypass-node load")
    if facts.paused or facts.paused_pods:
        of_pods = [by for each in facts.attachments for by in facts.pod_paused_by(each)]
        paused_by = sorted({*facts.paused_by, *of_pods}) or [report.OPERATOR]
        undo = report.undoing(paused_by, "tcpip-bypass-node resume")
        raise NodeError(f"the node or a pod of it is paused; first {undo}")
    records = [each for each in facts.attachments if each.pod_id in facts.attached]
    if not records:
        raise NodeError("no pod is accelerated on this node, so there is nothing to compare")
    return records


@contextlib.contextmanager
def pausing(node: Node) -> Iterator[Callable[[bool], None]]:
    """Pauses and resumes the node; it is resumed on leaving, also after a signal.

    What is yielded raises NodeError once an operator has paused or resumed the node meanwhile, and
    their pause stays, also one that came while the node was paused here. A pause of the cluster's
    switch always stays.
    """
    is_paused = False  # by us
    told: list[int] = []

    def set_paused(paused: bool) -> None:
        nonlocal is_paused
        with node.locked():
            found = pauses.in_kernel(node.generations.complete())
            if (found.node, found.is_trial) != (is_paused, is_paused):
                raise NodeError("the node was paused or resumed meanwhile; nothing is compared")
            is_paused = is_paused or paused
            pauses.apply(node, lambda own: replace(own, node=paused, is_trial=paused))
            is_paused = paused

    def resume() -> None:
        if is_paused:
            with node.locked():
                pauses.apply(node, _ended)

    def interrupt(number: int, _frame: FrameType | None) -> None:
        if not told:
            told.append(number)
            raise Interrupted(signal.Signals(number).name)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {each: signal.signal(each, interrupt) for each in signals}
    try:
        try:
            yield set_paused
        finally:
            try:
                told.append(0)  # no signal comes between us and the last resume
            finally:
                resume()
    except Interrupted as interrupted:
        raise NodeError(f"{interrupted} came; its own pause has ended") from interrupted
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _ended(own: pauses.Pauses) -> pauses.Pauses:
    """Without this measurement's pause; an operator's may have come in its place."""
    return replace(own, node=own.node and not own.is_trial, is_trial=False)


class Meter:
    """Reads what some pods have used and sent."""

    def __init__(self, node: Node, records: list[Attachment], host_proc: Path) -> None:
        self._node, self._records = node, records
        self._pods = [_pod(each) for each in records]
        self._host_proc = host_proc

    @property
    def pods(self) -> int:
        return len(self._records)

    def phase(self, seconds: float, *, paused: bool) -> Phase:
        """Looks for so long; raises NodeError when the pods have sent nothing, or have gone."""
        survey = Survey(self._pods, self._host_proc, with_files=False)
        began, cpu, bypassed = time.monotonic(), self._cpu_s(), self._bypassed()
        survey.look()
        while (left := began + seconds - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_S))
            survey.look()
        by_tcp = sum(each.all.bytes for each in survey.result(seconds).total.values())
        found = Phase(
            paused,
            time.monotonic() - began,
            self._cpu_s() - cpu,
            self._bypassed() - bypassed,
            by_tcp,
        )
        if found.bytes <= 0 or found.cpu_s <= 0:
            raise NodeError("the pods have sent nothing meanwhile; compare while there is a load")
        return found

    def _cpu_s(self) -> float:
        """CPU time of the pods' cgroups since they were made; a pod that has gone raises."""
        total = 0
        for record in self._records:
            try:
                text = (Path(record.cgroup) / "cpu.stat").read_text()
            except FileNotFoundError as error:
                pod = f"{record.pod_namespace}/{record.pod_name}"
                raise NodeError(f"pod {pod} has ended meanwhile; compare again") from error
            total += int(dict(line.split() for line in text.splitlines())["usage_usec"])
        return total / 1e6

    def _bypassed(self) -> int:
        generations = self._node.generations.complete()
        reading = report.counters(generations, [each.pod_id for each in self._records])
        return sum(hop.bypassed_bytes for hops in reading.values() for hop in hops.values())


def _pod(record: Attachment) -> Pod:
    return Pod(
        record.pod_namespace,
        record.pod_name,
        record.netns,
        frozenset(address for address, _ in record.ips),
        True,
        record.proxy_uid,
        policy.Plan(False, (), record.proxy_uid),
        "",
    )


def measure(meter: Meter, set_paused: Callable[[bool], None], length_s: float) -> Comparison:
    """PAIRS pairs of phases, paused first in every other one."""
    pairs = []
    for number in range(PAIRS):
        phases = {}
        for paused in (True, False) if number % 2 == 0 else (False, True):
            set_paused(paused)
            time.sleep(SETTLE_S)
            phases[paused] = meter.phase(length_s, paused=paused)
        pairs.append((phases[True], phases[False]))
        log.info("compared", f"pair {number + 1} of {PAIRS} is measured")
    return Comparison(meter.pods, pairs)


def as_json(found: Comparison) -> dict[str, Any]:
    """What `compare --json` prints; ratios are not paused to paused."""
    return {
        "version": VERSION,
        "kernel": platform.release(),
        "node": report.node_name(),
        "pods": found.pods,
        "cpu_per_byte": asdict(found.cpu_per_byte),
        "bytes_per_second": asdict(found.bytes_per_second),
        "phases": [asdict(phase) for pair in found.pairs for phase in pair],
    }


def lines(found: Comparison) -> Iterator[str]:
    """The comparison for a person."""
    yield f"{found.pods} pods, {len(found.pairs)} pairs of phases, paused and not"
    yield f"{'':10} {'CPUs':>8} {'MB/s':>10} {'CPU, ms per MB':>15} {'bypassed':>9}"
    for title, phases in (
        ("paused", [off for off, _ in found.pairs]),
        ("bypass", [on for _, on in found.pairs]),
    ):
        seconds, size = sum(p.seconds for p in phases), sum(p.bytes for p in phases)
        cpu, bypassed = sum(p.cpu_s for p in phases), sum(p.bypassed_bytes for p in phases)
        yield (
            f"{title:10} {cpu / seconds:8.3f} {size / seconds / 1e6:10.2f} "
            f"{cpu / size * 1e9:15.3f} {bypassed / size:9.1%}"
        )
    ratio = found.cpu_per_byte
    yield f"CPU per byte, bypass to paused: {ratio}, with 95 % confidence"
    yield f"Bytes per second, bypass to paused: {found.bytes_per_second}"
    if ratio.low <= 1 <= ratio.high:
        yield "No difference is shown: more load, or more --seconds, would say more."
