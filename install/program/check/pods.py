# SPDX-License-Identifier: Apache-2.0
"""Each pod of a node: accelerated, or why not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cni_plugin import policy
from install.program import report
from install.program.in_force import InForce
from install.program.report import Facts

if TYPE_CHECKING:
    from install.program.agent.cri import Sandbox

ACCELERATED, LOST, FAILED, PAUSED, WAITING, LEFT_OUT, GONE = (
    "accelerated",
    "lost",
    "failed",
    "paused",
    "waiting",
    "left out",
    "gone",
)
STATES = (ACCELERATED, LOST, FAILED, PAUSED, WAITING, LEFT_OUT, GONE)
WRONG = (LOST, FAILED, WAITING)


@dataclass(frozen=True)
class PodState:
    """One sandbox; `state` is of STATES, `why` is empty for one that is accelerated."""

    namespace: str
    name: str
    container_id: str
    state: str
    why: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def recorded(facts: Facts) -> list[PodState]:
    """What ADD has left for pods: records of those that it took in, and notes of failures."""
    found = []
    for record in facts.attachments:
        state, why = ACCELERATED, ""
        if record.pod_id in facts.lost:
            state, why = LOST, "it lost its programs; the agent sees to it"
        elif record.pod_id in facts.gone:
            state, why = GONE, "its cgroup is gone; the agent removes the record"
        elif facts.paused:
            undo = report.undoing(facts.paused_by, "tcpip-bypass-node resume")
            state, why = PAUSED, f"the node is paused: {undo}"
        elif record.pod_id in facts.paused_pods:
            pod = f"{record.pod_namespace}/{record.pod_name}"
            resume = f"tcpip-bypass-node resume --pod {pod}"
            undo = report.undoing(facts.pod_paused_by(record), resume)
            state, why = PAUSED, f"the pod is paused: {undo}"
        found.append(
            PodState(record.pod_namespace, record.pod_name, record.container_id, state, why)
        )
    for failure in facts.failures:
        found.append(
            PodState(failure.namespace, failure.name, failure.container_id, FAILED, failure.reason)
        )
    return found


def others(sandboxes: Iterable[Sandbox], known: Sequence[PodState], now: InForce) -> list[PodState]:
    """Running sandboxes without a record, by the rule that ADD goes by."""
    recorded_ids = {each.container_id for each in known}
    found = []
    for each in sandboxes:
        if not each.ready or each.id in recorded_ids:
            continue
        pod = policy.Pod(each.pod_namespace, each.pod_name, each.pod_uid, each.annotations)
        decision = policy.decide(now.conf, pod, now.decided)
        state, why = LEFT_OUT, decision.reason
        if decision.plan is not None:
            state, why = WAITING, "it started without us; the agent, or gc --adopt, takes it in"
        found.append(PodState(each.pod_namespace, each.pod_name, each.id, state, why))
    return found


def sandboxes_of(socket: Path) -> list[Sandbox]:
    """The runtime's list; raises CriError."""
    from install.program.agent.cri import Runtime, connected  # noqa: PLC0415 - see there

    with connected(socket) as channel:
        return Runtime(channel).sandboxes()
