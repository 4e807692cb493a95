# SPDX-License-Identifier: Apache-2.0
"""Who has paused what: the operator of this node, by `pause`, and the cluster's switch.

The kernel knows only what is paused. `switch.json` tells which of it the switch alone wants, so
that each of the two can end its own pauses and not the other's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bpf import abi
from cni_plugin import names
from install.program import log
from install.program import switch as switches
from install.program.generations import Generation
from install.program.pods import attached_cgroups, has_cgroup
from install.program.switch import Kept, Switch

if TYPE_CHECKING:
    from install.program.node import Node


@dataclass(frozen=True)
class Pauses:
    """The whole node, or single pods by their IDs.

    `is_trial`: the node's is a measurement's, unless somebody else pauses it meanwhile.
    """

    node: bool = False
    pods: frozenset[int] = frozenset()
    is_trial: bool = False


def in_kernel(generations: Iterable[Generation]) -> Pauses:
    """What is paused now: the node when there are generations and all of them are."""
    flags, pods = list[int](), set[int]()
    for generation in generations:
        with contextlib.suppress(FileNotFoundError):  # removed by a load since it was listed
            flags.append(generation.flags())
            pods |= generation.paused_pods()
    is_paused = bool(flags) and all(each & abi.CONTROL_PAUSED for each in flags)
    is_trial = is_paused and all(each & abi.CONTROL_TRIAL for each in flags)
    return Pauses(is_paused, frozenset(pods), is_trial)


def apply(
    node: Node,
    change: Callable[[Pauses], Pauses] = lambda own: own,
    switch: Switch | None = None,
) -> int:
    """Pauses what the operator and the switch want, and nothing else. Call it under the lock.

    ``change`` is what the operator changes about their own pauses. ``switch`` is what the agent has
    read, None what was kept last. Returns how many generations there are; raises OSError.
    """
    generations = node.generations.complete()
    found = switches.kept(node.state)
    before = found or Kept()
    now = in_kernel(generations)
    is_own = now.node and not before.holds_node
    own = change(Pauses(is_own, now.pods - before.held_pods, is_own and now.is_trial))
    if own.pods:
        own = replace(own, pods=own.pods & _alive(node))
    switch = switch or before.switch
    wanted = Pauses(switch.is_stop, _pods_of(node, switch.exclude_namespaces, before.held_pods))
    after = Kept(switch, wanted.node and not own.node, wanted.pods - own.pods)
    # A process that dies half way must not leave a pause of the switch's that counts as the
    # operator's: the file claims it before the kernel has it, and as long as the kernel has it.
    _keep(
        node,
        replace(
            after,
            holds_node=before.holds_node or after.holds_node,
            held_pods=before.held_pods | after.held_pods,
        ),
    )
    both = Pauses(own.node or wanted.node, own.pods | wanted.pods, own.is_trial)
    _into_kernel(node, generations, now, both)
    _keep(node, after)
    return len(generations)


def _alive(node: Node) -> frozenset[int]:
    """The IDs of the pods that are there, with our programs or without: the pauses of others are to
    be forgotten."""
    pods = attached_cgroups(node.generations.program_ids())
    attached = frozenset(pod.record.id for pod in pods if pod.record is not None)
    return attached | {each.pod_id for each in node.attachments() if has_cgroup(each)}


def _into_kernel(
    node: Node, generations: Iterable[Generation], now: Pauses, wanted: Pauses
) -> None:
    """What a load that found the kernel unfit has paused, of the first edition, stays paused."""
    current = node.generations.current()
    is_unfit = node.state.node_mode()[0] == "off"
    for generation in generations:
        with contextlib.suppress(FileNotFoundError):
            is_new = (wanted.node, wanted.is_trial) != (now.node, now.is_trial)
            if is_new and (wanted.node or generation == current or not is_unfit):
                generation.set_paused(wanted.node, is_trial=wanted.is_trial)
            if wanted.pods != generation.paused_pods():
                generation.set_paused_pods(set(wanted.pods))


def _keep(node: Node, what: Kept) -> None:
    """A state folder that cannot be written is no reason not to pause."""
    there = switches.kept(node.state)
    path = node.state.folder / names.SWITCH_JSON
    if what == there or (there is None and what == Kept() and not path.exists()):
        return
    try:
        switches.keep(node.state, what)
    except OSError as error:
        log.error("switch_not_kept", f"pods that start now do not know the switch: {error}")


def _pods_of(node: Node, namespaces: tuple[str, ...], before: frozenset[int]) -> frozenset[int]:
    """The pods of these namespaces; those of before when the state folder cannot be read."""
    if not namespaces:
        return frozenset()
    try:
        return frozenset(r.pod_id for r in node.attachments() if r.pod_namespace in namespaces)
    except OSError as error:
        log.warning("pods_unknown", f"pods that came since may bypass: {error}")
        return before
