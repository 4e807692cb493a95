# SPDX-License-Identifier: Apache-2.0
"""Brings attachments in line with the sandboxes that the runtime has.

A sandbox that was there before us, or that started while nothing was loaded, gets the very call
that the runtime would have made: ADD, to the installed plugin. So there is one way into the
kernel, and one place that decides which pod is accelerated. Then its open connections are taken in.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpf import abi, pins
from bpf.loader import takes_in
from cni_plugin import attachment, names, policy
from cni_plugin.netconf import NetConf
from cni_plugin.policy import Plan
from cni_plugin.state import Attachment, Key
from install.program import log, whole_file
from install.program.agent.cri import CriError, Network, Runtime, Sandbox, connected
from install.program.conf_dir import ConfDir
from install.program.generations import Generation, opened
from install.program.in_force import InForce, in_force
from install.program.installer import Places
from install.program.node import LOCK_PATIENCE_S, Node, NodeError
from install.program.passes import PassTimeout, Runner
from install.program.pods import has_cgroup, programs_of

IFNAME = "eth0"  # what every CRI runtime calls a pod's interface
PLUGIN_TIMEOUT_S = 60
# ADD runs before the runtime lists the sandbox, which then still has to start. When the clock is
# set forward meanwhile, a record may seem older and go; the repair that follows makes it again.
YOUNG_S = 300.0


@dataclass(frozen=True)
class Plugin:
    """Our plugin as it stands in the node's conflist."""

    program: Path
    conflist: Path
    network: str
    cni_version: str
    entry: dict[str, Any]


@dataclass
class Tally:
    """What was done; the same keys in the JSON that the agent reads."""

    removed: int = 0
    attached: int = 0
    failed: int = 0
    young_s: float = 0.0  # until records that were too young to be judged are not; 0: none was


def run(node: Node, places: Places, socket: Path, *, attach: bool) -> Tally:
    """What `tcpip-bypass-node gc` does; nothing when the runtime does not answer.

    Raises NodeError, OSError, or CriError.
    """
    ours = ConfDir(places.conf_dir).ours()
    if ours is None:
        raise NodeError(f"our entry is in no network configuration in {places.conf_dir}; install")
    plugin = Plugin(places.files.link, ours.path, ours.network, ours.cni_version, ours.entry)
    tally = Tally()
    with connected(socket) as channel:
        runtime = Runtime(channel)
        sandboxes = runtime.sandboxes()
        collect(node, plugin.network, sandboxes, tally)
        if attach:
            adopt(node, plugin, runtime, sandboxes, tally)
    return tally


def collect(node: Node, network: str, sandboxes: Iterable[Sandbox], tally: Tally) -> None:
    """Undoes attachments of this network whose sandbox is gone.

    Not through the plugin's GC: that takes a list of all that is valid, and a sandbox made
    between our look at the runtime and that call would be missing in it.
    """
    alive = {sandbox.id for sandbox in sandboxes}
    for key in node.state.keys():  # noqa: SIM118 - not a dict
        if key.container_id in alive:
            continue
        try:
            young_s = 0.0 if _is_ended(node, key) else _young_s(node, key)
            gone = not young_s and not _is_running(node, key) and _undo(node, network, key)
        except OSError as error:
            tally.failed += 1
            log.error(
                "attachment_stays",
                f"the attachment of a sandbox that is gone cannot be undone: {error}",
                container=key.container_id,
            )
            continue
        tally.young_s = max(tally.young_s, young_s)
        if gone:
            tally.removed += 1
            log.info(
                "attachment_removed",
                "removed the attachment of a sandbox that is gone",
                container=key.container_id,
            )


def _is_ended(node: Node, key: Key) -> bool:
    """Whether the pod has been and gone: ADD opened the cgroup before it wrote the record."""
    record = node.state.read(key)
    return record is not None and not has_cgroup(record)


def _is_running(node: Node, key: Key) -> bool:
    """Whether processes are in the pod's cgroup, and it has our programs by this very record: a pod
    of another runtime, whose list we have not seen."""
    record = node.state.read(key)
    if record is None or not programs_of(record):
        return False
    with contextlib.suppress(FileNotFoundError):  # it has just ended
        return "populated 1" in Path(record.cgroup, "cgroup.events").read_text()
    return False


def _young_s(node: Node, key: Key) -> float:
    """For how long its record or note, whole or half written, is too young yet; YOUNG_S at most.

    So long it is also when it was made in the clock's future.
    """
    files = [
        file
        for folder in (names.ATTACHMENTS, names.FAILURES)
        for file in (node.state_dir / folder).glob(f"{key.container_id}:{key.ifname}.*")
    ]
    try:
        left = [file.stat().st_mtime + YOUNG_S - time.time() for file in files]
    except FileNotFoundError:
        return YOUNG_S  # it changes at this moment
    return min(max(0.0, *left), YOUNG_S) if left else 0.0


def _undo(node: Node, network: str, key: Key) -> bool:
    """Attachments of other networks, perhaps of another runtime, are left while they have a cgroup.
    Raises OSError."""
    with node.state.locked(LOCK_PATIENCE_S):
        record = node.state.read(key)
        if record is not None and record.network != network and has_cgroup(record):
            return False
        attachment.undo(node.state, str(node.bpffs), key, record)
        return True


def adopt(
    node: Node, plugin: Plugin, runtime: Runtime, sandboxes: Iterable[Sandbox], tally: Tally
) -> None:
    """ADDs every running sandbox that may concern us and that has no attachment."""
    current = node.generations.current()
    if current not in node.generations.complete():
        return  # nothing is loaded, as the plugin would say for each of them
    program_id = current.sock_ops_id()
    now = _in_force(node, plugin)
    conf = now.conf
    attached, waiting = list[Key](), _waiting(node)
    for sandbox in sandboxes:
        # As ADD would decide; to ask it would cost 30 ms for each pod that is left alone.
        plan = _plan(now, sandbox) if sandbox.ready else None
        if plan is None:
            continue
        key = Key(sandbox.id, IFNAME)
        if _is_attached(node, sandbox, program_id, conf, plan):
            attached.append(key)
            continue
        about = {"pod": f"{sandbox.pod_namespace}/{sandbox.pod_name}", "container": sandbox.id}
        try:
            said = _add(plugin, runtime, sandbox)
        except (CriError, OSError, subprocess.SubprocessError, ValueError) as error:
            tally.failed += 1
            log.error("pod_not_repaired", f"the pod stays on TCP: {error}", **about)
            continue
        if _is_attached(node, sandbox, program_id, conf, plan):
            tally.attached += 1
            attached.append(key)
            if waiting is not None and (record := node.state.read(key)):
                waiting.add(record.pod_id)
                _write_waiting(node, waiting)  # if this process is ended
            log.info("pod_repaired", "accelerated a pod that had been running without", **about)
        elif said:
            log.info("pod_left_alone", said, **about)
    take_in(node, current, attached, waiting)


def take_in(
    node: Node, current: Generation, attached: Iterable[Key], waiting: set[int] | None
) -> None:
    """The older connections of the pods that are ``waiting`` for that, by their IDs; None: of all.

    After all are attached, since both ends look for each other.
    """
    if not takes_in(platform.release()):
        return
    records = [record for key in attached if (record := node.state.read(key))]
    due = [record for record in records if waiting is None or record.pod_id in waiting]
    if due or waiting is None:
        _write_waiting(node, _take_in_all(current, due))


def _take_in_all(current: Generation, due: list[Attachment]) -> list[int]:
    """Returns the IDs of the pods that could not be taken in."""
    left, runner = [], Runner()
    try:
        with opened(current.folder / pins.TAKE_IN) as program:
            for record in due:
                try:
                    runner.take_in(program, Path(record.cgroup))
                except PassTimeout:
                    continue  # it goes on by itself
                except (EOFError, OSError) as error:
                    left.append(record.pod_id)
                    why = f"the pod's open connections stay on TCP, for now: {error}"
                    log.warning("connections_not_taken_in", why, **log.of(record))
    except FileNotFoundError:  # programs of an older version
        return [record.pod_id for record in due]
    finally:
        runner.close()
    return left


def _write_waiting(node: Node, pod_ids: Iterable[int]) -> None:
    with contextlib.suppress(OSError):  # a full disk
        whole_file.write(node.state_dir / names.TAKE_IN_JSON, json.dumps(sorted(pod_ids)))


def _waiting(node: Node) -> set[int] | None:
    """The IDs of pods that could not be taken in yet; None when none was tried so far."""
    try:
        return set(json.loads((node.state_dir / names.TAKE_IN_JSON).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _in_force(node: Node, plugin: Plugin) -> InForce:
    try:
        return in_force(node.state, plugin.entry, plugin.conflist)
    except ValueError as error:
        raise NodeError(str(error)) from error


def _plan(now: InForce, sandbox: Sandbox) -> Plan | None:
    pod = policy.Pod(sandbox.pod_namespace, sandbox.pod_name, sandbox.pod_uid, sandbox.annotations)
    return policy.decide(now.conf, pod, now.decided).plan


def _is_attached(node: Node, sandbox: Sandbox, program_id: int, conf: NetConf, plan: Plan) -> bool:
    """Whether this program is on the pod's cgroup, with this sandbox' record, as planned."""
    record = node.state.read(Key(sandbox.id, IFNAME))
    if record is None or program_id not in programs_of(record):
        return False
    found = [tuple(ports) for ports in record.excluded_ports]
    return (
        found == list(plan.excluded_ports)
        and bool(record.flags & abi.POD_PROXY_ONLY) == plan.proxy_only
        and bool(record.flags & abi.POD_FORCED) == (conf.mode != "auto")
    )


def _add(plugin: Plugin, runtime: Runtime, sandbox: Sandbox) -> str:
    """Calls the plugin as the runtime would; returns what it wrote to stderr.

    Raises CriError, OSError, SubprocessError, or ValueError when it cannot be or did not go well.
    """
    network = runtime.network(sandbox.id)
    if network.of_the_host or not network.ready:  # ended since we saw the list
        return ""
    if not (network.netns and network.ips):
        raise ValueError("the runtime does not tell the sandbox's network namespace or addresses")
    done = subprocess.run(
        [plugin.program],
        input=json.dumps(configuration(plugin, sandbox, network)),
        env=environment(plugin, sandbox, network),
        capture_output=True,
        text=True,
        timeout=PLUGIN_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"{plugin.program} ADD: {done.stdout.strip() or done.stderr.strip()}")
    return done.stderr.strip()


def configuration(plugin: Plugin, sandbox: Sandbox, network: Network) -> dict[str, Any]:
    """What libcni writes to a plugin's stdin: libcni/api.go, buildOneConfig."""
    offered = {names.CGROUP_PATH: network.cgroup_parent, names.POD_ANNOTATIONS: sandbox.annotations}
    wanted = plugin.entry.get("capabilities") or {}
    ips = [ipaddress.ip_interface(address).with_prefixlen for address in network.ips]
    return {
        **plugin.entry,
        "name": plugin.network,
        "cniVersion": plugin.cni_version,
        "runtimeConfig": {key: value for key, value in offered.items() if wanted.get(key)},
        "prevResult": {
            "cniVersion": plugin.cni_version,
            "interfaces": [{"name": IFNAME, "sandbox": network.netns}],
            "ips": [{"address": address, "interface": 0} for address in ips],
        },
    }


def environment(plugin: Plugin, sandbox: Sandbox, network: Network) -> dict[str, str]:
    arguments = {
        "IgnoreUnknown": "1",
        "K8S_POD_NAMESPACE": sandbox.pod_namespace,
        "K8S_POD_NAME": sandbox.pod_name,
        "K8S_POD_INFRA_CONTAINER_ID": sandbox.id,
        "K8S_POD_UID": sandbox.pod_uid,
    }
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": sandbox.id,
        "CNI_NETNS": network.netns,
        "CNI_IFNAME": IFNAME,
        "CNI_ARGS": ";".join(f"{key}={value}" for key, value in arguments.items()),
        "CNI_PATH": str(plugin.program.parent),
    }
