# SPDX-License-Identifier: Apache-2.0
"""What is on this node, read from the kernel and the state folder: for `status` and the metrics."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bpf import abi, bpfsys, pins, stats
from bpf.stats import HopCounters
from cni_plugin import names
from cni_plugin.state import Attachment
from install.program import VERSION, exits, in_force, pauses
from install.program import switch as switches
from install.program.conf_dir import ConfDir
from install.program.generations import Generation, opened
from install.program.pods import has_cgroup, programs_of
from install.program.switch import Kept

if TYPE_CHECKING:
    from install.program.node import Node

OPERATOR, SWITCH = "operator", "switch"  # what pauses a node or a pod

NO_JOINER = "no joiner runs: the agent runs it, or tcpip-bypass-node join"
RETIRED = "its sockets were told to leave: see `mend_lost` in the log, or load again"

# MISMATCH is the outcome of a connection whose addresses do not fit. Then comes what to do.
MISMATCH = "mismatch"
OLD_LISTENER = (
    "a server that listened before its pod was taken in: restart it; "
    "clients with a sidecar stay on TCP"
)
UNKNOWN_SERVICE = (
    "a sidecar that dials a ClusterIP does not know the Service: tell Istio of it; "
    "clients without a sidecar stay on TCP"
)

Hops = dict[str, HopCounters]
Reading = dict[tuple[int, int], Hops]  # by (ID of the map, pod ID)


@dataclass(frozen=True)
class Failure:
    """A pod that ADD, or the agent, wanted to accelerate and could not."""

    container_id: str
    ifname: str
    namespace: str
    name: str
    reason: str
    time: int  # seconds since the epoch


@dataclass(frozen=True)
class Facts:
    """The node's state but for its counters."""

    current: Generation | None
    generations: list[Generation]  # the current one and older ones that are in use
    paused: bool
    paused_pods: frozenset[int]  # IDs of single pods
    mode: str
    reason: str
    attachments: list[Attachment]
    attached: frozenset[int]  # IDs of the pods whose programs are where they should be
    failures: list[Failure]
    plugin_problem: str = ""  # why the node cannot run the plugin; empty when it can
    switch: Kept = field(default_factory=Kept)  # the cluster's
    forced: str | None = None  # the mode that the network configuration forces, if it does
    gone: frozenset[int] = frozenset()  # IDs of pods whose cgroup is there no more
    lost_answers: int | None = None  # that the mend of FIONREAD could not write; None: no mend
    joining_problem: str = ""  # why no connection joins and all bytes go by TCP; not a pause

    @property
    def lost(self) -> frozenset[int]:
        """IDs of pods that are there without the programs that they should have."""
        return frozenset(record.pod_id for record in self.attachments) - self.attached - self.gone

    @property
    def named_mode(self) -> tuple[str, str] | None:
        """The mode that is forced, and what forces it; None when it is the self-test's."""
        return in_force.named_mode(self.forced, self.switch.switch.mode)

    @property
    def mode_in_force(self) -> str:
        """What holds for pods that start now."""
        return self.named_mode[0] if self.named_mode else self.mode

    @property
    def paused_by(self) -> tuple[str, ...]:
        """OPERATOR, SWITCH or both, as far as their pause holds for the whole node."""
        by_switch = self.switch.switch.is_stop or (self.paused and self.switch.holds_node)
        by_operator = self.paused and not self.switch.holds_node
        return (OPERATOR,) * by_operator + (SWITCH,) * by_switch

    def pod_paused_by(self, record: Attachment) -> tuple[str, ...]:
        """The same of this pod alone."""
        is_paused = record.pod_id in self.paused_pods
        is_held = record.pod_id in self.switch.held_pods
        is_excluded = record.pod_namespace in self.switch.switch.exclude_namespaces
        by_operator, by_switch = is_paused and not is_held, is_paused and (is_held or is_excluded)
        return (OPERATOR,) * by_operator + (SWITCH,) * by_switch

    @property
    def exit_status(self) -> int:
        """Of `exits`: whether the bypass is on, and for every pod that is to have it."""
        if self.current not in self.generations:
            return exits.NOT
        of_pods = self.paused or self.paused_pods or self.lost or self.failures
        is_less = of_pods or self.plugin_problem or self.joining_problem or self.lost_answers
        status = exits.of_forced(self.mode_in_force, self.mode)
        return max(status, exits.LESS) if is_less else status


def facts(node: Node) -> Facts:
    """Raises OSError when the kernel or a folder cannot be read."""
    complete = node.generations.complete()
    paused = pauses.in_kernel(complete)
    mode, reason = node.state.node_mode()
    attachments = node.attachments()
    attached = frozenset(record.pod_id for record in attachments if programs_of(record))
    without = [record for record in attachments if record.pod_id not in attached]
    return Facts(
        current=node.generations.current(),
        generations=complete,
        paused=paused.node,
        paused_pods=paused.pods,
        mode=mode,
        reason=reason,
        attachments=attachments,
        attached=attached,
        gone=frozenset(record.pod_id for record in without if not has_cgroup(record)),
        failures=_failures(node),
        plugin_problem=node.plugin_problem,
        switch=switches.kept(node.state) or Kept(),
        forced=forced_mode(node),
        lost_answers=_lost_answers(complete),
        joining_problem=_joining_problem(complete, node.generations.current()),
    )


def undoing(paused_by: Sequence[str], resume: str) -> str:
    """What ends such a pause; ``resume`` is the command that ends an operator's."""
    edit = f"edit the ConfigMap {switches.CONFIGMAP}, the cluster's switch"
    done = {OPERATOR: resume, SWITCH: edit}
    return ", and ".join(done[each] for each in paused_by)


def configured(node: Node) -> dict[str, Any]:
    """Our entry in the node's network configuration, if it is of this node's folders."""
    ours = ConfDir(node.conf_dir).ours() if node.conf_dir is not None else None
    if ours is None or ours.entry.get("stateDir", names.STATE_DIR) != str(node.state_dir):
        return {}
    return ours.entry


def forced_mode(node: Node) -> str | None:
    """The mode that the node's network configuration forces; None when it leaves it to us."""
    mode = configured(node).get("mode")
    return mode if mode in names.MODES else None


def _lost_answers(generations: Iterable[Generation]) -> int | None:
    """Of all generations that mend FIONREAD; None when none does."""
    lost = []
    for each in generations:
        with contextlib.suppress(FileNotFoundError):  # it has just been removed
            lost += [each.lost_answers()] if each.is_mended() else []
    return sum(lost) if lost else None


def _joining_problem(generations: list[Generation], current: Generation | None) -> str:
    if current not in generations:
        return ""  # nothing is loaded, or half of it, which is said elsewhere
    with contextlib.suppress(FileNotFoundError):  # it has just been removed
        silent_s = current.joiner_silent_s()
        if current.is_retired():
            return RETIRED
        if silent_s is None:
            return NO_JOINER
        if silent_s > abi.SILENCE_S:
            return f"{NO_JOINER}; the last one fell silent {silent_s:.0f} s ago"
    return ""


def node_name() -> str:
    """The node's name as Kubernetes has it, where the DaemonSet tells; else its host name."""
    return os.environ.get("NODE_NAME") or platform.node()


def _failures(node: Node) -> list[Failure]:
    """Oldest first; a note that is torn or has just gone is none."""
    found = []
    for path in (node.state_dir / names.FAILURES).glob("*.json"):
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            noted, time = json.loads(path.read_bytes()), int(path.stat().st_mtime)
            found.append(Failure(**noted, time=time))
    return sorted(found, key=lambda failure: failure.time)


def counters(generations: Iterable[Generation], pod_ids: Iterable[int]) -> Reading:
    """What each pod has counted under each generation; those without counters are left out.

    So is a generation of another version whose counters are others.
    """
    ids, reading = list(pod_ids), {}
    for generation in generations:
        with (
            contextlib.suppress(FileNotFoundError),
            opened(generation.folder / pins.COUNTERS) as fd,
        ):
            counted = bpfsys.map_info(fd)
            if counted.value_size != ctypes.sizeof(abi.Counters):
                continue
            lookup = functools.partial(bpfsys.map_lookup, fd)
            for pod_id in ids:
                if hops := stats.pod_counters(pod_id, lookup):
                    reading[counted.id, pod_id] = hops
    return reading


def by_pod(reading: Reading) -> dict[int, Hops]:
    """All generations together."""
    pods: dict[int, Hops] = {}
    for (_, pod_id), hops in reading.items():
        add(pods.setdefault(pod_id, {}), hops)
    return pods


def add(total: Hops, hops: Hops) -> None:
    """Adds `hops` to `total`, hop by hop."""
    for hop, counted in hops.items():
        total[hop] = total.get(hop, HopCounters()) + counted


def advice(record: Attachment, hops: Hops) -> str | None:
    """What to do so that more of the pod's connections are paired; None when that is nothing."""
    if not any(counted.connections.get(MISMATCH) for counted in hops.values()):
        return None
    return OLD_LISTENER if record.flags & abi.POD_SERVICES else UNKNOWN_SERVICE


class Growth:
    """What counters grow by from one reading to the next, whatever comes and goes meanwhile.

    A map, and a pod in it, counts from zero; both vanish with all they have counted. So what is
    new counts in full, what is gone has been counted, and nothing ever shrinks. What a pod
    counts between the last reading and its DEL is not seen.
    """

    def __init__(self, first: Reading) -> None:
        self._last = first

    def pod_ids(self) -> set[int]:
        """Pods of the last reading: to be read again, so that only the kernel says who is gone."""
        return {pod_id for _, pod_id in self._last}

    def to(self, reading: Reading) -> dict[int, Hops]:
        """The growth from the last reading to this one, by pod ID."""
        grown = {
            key: {
                hop: now.since(self._last.get(key, {}).get(hop, HopCounters()))
                for hop, now in hops.items()
            }
            for key, hops in reading.items()
        }
        self._last = reading
        return by_pod(grown)


def report(node: Node) -> dict[str, Any]:
    """What `status --json` prints."""
    return as_json(facts(node))


def as_json(found: Facts) -> dict[str, Any]:
    """The node's state with its pods' counters, as one JSON document."""
    pods = by_pod(counters(found.generations, [record.pod_id for record in found.attachments]))
    return {
        "version": VERSION,
        "kernel": platform.release(),
        "node": node_name(),
        "loaded": found.current is not None,
        "generation": found.current.number if found.current else None,
        "older_generations": [g.number for g in found.generations if g != found.current],
        "paused": found.paused,
        "paused_by": found.paused_by,
        "switch": found.switch.switch.as_json(),
        "mode": found.mode,
        "forced_mode": found.forced,
        "mode_in_force": found.mode_in_force,
        "reason": found.reason,
        "fionread": {"mended": found.lost_answers is not None, "lost": found.lost_answers or 0},
        "plugin_problem": found.plugin_problem or None,
        "joining_problem": found.joining_problem or None,
        "pods": [_pod(record, found, pods.get(record.pod_id, {})) for record in found.attachments],
        "failures": [asdict(failure) for failure in found.failures],
    }


def _pod(record: Attachment, found: Facts, hops: Hops) -> dict[str, Any]:
    return {
        "pod_id": record.pod_id,
        "namespace": record.pod_namespace,
        "name": record.pod_name,
        "container_id": record.container_id,
        "ifname": record.ifname,
        "ips": sorted({address for address, _ in record.ips}),
        "generation": record.generation,
        "attached": record.pod_id in found.attached,
        "gone": record.pod_id in found.gone,
        "paused": record.pod_id in found.paused_pods,
        "paused_by": found.pod_paused_by(record),
        "proxy_only": bool(record.flags & abi.POD_PROXY_ONLY),
        "forced": bool(record.flags & abi.POD_FORCED),
        "excluded_ports": record.excluded_ports,
        "advice": advice(record, hops),
        "hops": {hop: asdict(counted) for hop, counted in hops.items()},
    }
