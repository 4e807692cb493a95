# SPDX-License-Identifier: Apache-2.0
"""The part of ADD that is for pods we may have to do with: decide, record, attach."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bpf import abi, bpfsys, pins
from cni_plugin import attachment, cgroup, log, names, netconf, netns, policy, results, schema
from cni_plugin.protocol import InvalidNetns
from cni_plugin.state import Attachment, Key, State

if TYPE_CHECKING:
    from cni_plugin.netconf import NetConf
    from cni_plugin.policy import Plan, Pod
    from cni_plugin.protocol import Json, Request
    from cni_plugin.results import PodAddress

_LOCK_PATIENCE_S = 2.0


class CgroupNotFound(Exception):
    """The pod has no cgroup to attach to; the message says which places were searched."""


def accelerate(request: Request, pod: Pod, result: Json) -> None:
    """Accelerate the pod, or say on stderr why not.

    Raises InvalidNetns for a malformed call, anything else when it did not work out; then
    nothing of it is left in the kernel, or it is recorded for DEL and GC.
    """
    _refuse_own_netns(request)
    addresses = results.pod_addresses(result, request.call.ifname)
    conf = _configuration(request)
    state = State(conf.state_dir)
    switch = state.switch()
    conf = netconf.under_switch(conf, switch)
    mode = _mode(conf, state, netconf.mode_named_by(switch))
    decision = policy.decide(conf, pod, mode)
    if decision.plan is None:
        log.say(f"not accelerated: {decision.reason}")
        return
    try:
        attachment.current_generation(conf.bpffs)  # after a reboot: say so and go no further
        draft = _draft(request, conf, pod, decision.plan, addresses)
        if draft is not None:
            state.make()
            with state.locked(_LOCK_PATIENCE_S):
                if conf.mode == "auto" and state.node_mode()[0] != mode[0]:
                    raise attachment.NotLoaded("a load has changed the node's mode meanwhile")
                _attach(draft, state, conf.bpffs)
    except attachment.NotLoaded as error:
        log.say(f"warning: not accelerated: {error}")


def _refuse_own_netns(request: Request) -> None:
    call = request.call
    if netns.is_own(call.netns) and not call.netns_override:
        raise InvalidNetns(
            "CNI_NETNS is the plugin's own network namespace",
            f"{call.netns}: set CNI_NETNS_OVERRIDE=1 if that is meant",
        )


def _configuration(request: Request) -> NetConf:
    netconf.refuse_unsupported(request.conf)
    schema.validate(request.conf, Path(netconf.folders(request.conf)[1]))
    return netconf.parse(request.conf)


def _mode(conf: NetConf, state: State, by: str) -> tuple[str, str]:
    """The mode in force and why: what ``by`` forces, if it does, else the node's."""
    if conf.mode == "auto":
        return state.node_mode()
    if conf.mode != "off":
        found, reason = state.node_mode()
        if found != conf.mode:
            log.say(f"warning: {by} forces mode {conf.mode}; this node's own is {found}: {reason}")
    return conf.mode, f"{by} says so"


def _draft(
    request: Request, conf: NetConf, pod: Pod, plan: Plan, addresses: list[PodAddress]
) -> Attachment | None:
    """The attachment, but for the programs; None, having said why, when it cannot be."""
    if not addresses:
        log.say("not accelerated: prevResult has no address of the pod")
        return None
    if len(addresses) > abi.MAX_IPS:
        log.say(f"warning: only the first {abi.MAX_IPS} of {len(addresses)} addresses count")
    if len(plan.excluded_ports) > abi.MAX_PORT_RANGES:
        log.say(
            f"warning: not accelerated: {len(plan.excluded_ports)} separate ranges of excluded "
            f"ports, of which there may be {abi.MAX_PORT_RANGES}"
        )
        return None
    folder, why = cgroup.find(policy.cgroup_path_of(request), pod.uid)
    if folder is None:
        raise CgroupNotFound(why)
    call = request.call
    return Attachment(
        container_id=call.container_id,
        ifname=call.ifname,
        network=request.name,
        netns=call.netns,
        pod_namespace=pod.namespace,
        pod_name=pod.name,
        pod_uid=pod.uid,
        cgroup=str(folder),
        inode=folder.stat().st_ino,
        pod_id=attachment.pod_id(call.container_id, call.ifname),
        prog_id=0,
        generation="",
        flags=(abi.POD_PROXY_ONLY if plan.proxy_only else 0)
        | (abi.POD_FORCED if conf.mode != "auto" else 0)
        | (0 if pod.in_mesh or plan.proxy_only else abi.POD_SERVICES),  # Envoy dials pods
        proxy_uid=_proxy_uid(call.netns, plan.proxy_uid),
        ips=[list(address) for address in addresses[: abi.MAX_IPS]],
        excluded_ports=[list(ports) for ports in plan.excluded_ports],
    )


def _proxy_uid(path: str, uid: int) -> int:
    """The sidecar's user ``uid`` of the pod with this network namespace, as the host counts.

    If it is not to be found, the pod is accelerated as one without a sidecar.
    """
    try:
        found = netns.uid_on_host(path, uid)
    except OSError as error:
        log.say(f"warning: the pod's user namespace is not known: {error}")
        return uid
    if found == names.NO_UID:
        log.say(f"warning: the pod has no user {uid}: no socket of it counts as a sidecar's")
    return found


def _attach(draft: Attachment, state: State, bpffs: str) -> None:
    """Under the lock: `tcpip-bypass-node load` changes the generation under it, too."""
    sibling = _sibling(draft, state)
    if sibling is not None:
        log.say(f"not accelerated: interface {sibling} of the same pod is")
        return
    generation = attachment.current_generation(bpffs)
    with bpfsys.closing(generation.open(pins.SOCK_OPS)) as program_fd:
        program_id = bpfsys.prog_info(program_fd).id
    record = draft._replace(prog_id=program_id, generation=generation.name)
    key = Key(record.container_id, record.ifname)
    before = state.read(key)
    if before is not None and before.inode != record.inode:
        # An ADD repeated without a DEL, and the pod's cgroup was made anew in between.
        attachment.take_out(before.cgroup, before.inode, before.pod_id)
    state.write(record)
    try:
        attachment.put(record, generation)
    except BaseException:
        attachment.undo(state, bpffs, key, record)
        raise


def _sibling(draft: Attachment, state: State) -> str | None:
    """Another interface of this container that is accelerated on the same cgroup.

    A cgroup has one record. The first interface keeps it; the addresses of a later one are in
    no record, and its connections stay on TCP.
    """
    for key in state.keys(draft.container_id):
        if key.container_id == draft.container_id and key.ifname != draft.ifname:
            other = state.read(key)
            if other is not None and other.inode == draft.inode:
                return other.ifname
    return None
