# SPDX-License-Identifier: Apache-2.0
"""The pods of a node that have a network namespace of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute

from cni_plugin import names, netns, policy
from cni_plugin.netconf import NetConf
from install.program.estimate import sockets

_ENVOY_PORTS = {15001, 15006}  # Istio's outbound and inbound listener


@dataclass(frozen=True)
class Pod:
    """One pod, and what would be done with it."""

    namespace: str
    name: str
    netns: str  # a path
    ips: frozenset[str]
    in_mesh: bool
    proxy_uid: int  # the sidecar's user, as the host counts
    plan: policy.Plan | None  # None: it stays on TCP
    reason: str  # then, why

    @property
    def title(self) -> str:
        return f"{self.namespace}/{self.name}"


def planned(conf: NetConf, described: policy.Pod, namespace: str, ips: frozenset[str]) -> Pod:
    """A pod as ADD would decide, on a kernel that allows everything."""
    decision = policy.decide(
        conf, described, (_mode(conf), "the configuration, or the cluster's switch, says so")
    )
    proxy_uid = decision.plan.proxy_uid if decision.plan else conf.proxy_uid
    with contextlib.suppress(OSError):  # it has ended
        proxy_uid = netns.uid_on_host(namespace, proxy_uid)
    return Pod(
        described.namespace,
        described.name,
        namespace,
        ips,
        described.in_mesh,
        proxy_uid,
        decision.plan,
        decision.reason,
    )


def _mode(conf: NetConf) -> str:
    return "full" if conf.mode == "auto" else conf.mode


def of_runtime(socket: Path, conf: NetConf) -> list[Pod]:
    """The running pods that the container runtime lists; raises CriError."""
    from install.program.agent.cri import Runtime, connected  # noqa: PLC0415 - see there

    found = []
    with connected(socket) as channel:
        runtime = Runtime(channel)
        for each in runtime.sandboxes():
            if not each.ready:
                continue
            network = runtime.network(each.id)
            if network.of_the_host or not network.ready or not network.netns:
                continue
            described = policy.Pod(
                each.pod_namespace, each.pod_name, each.pod_uid, each.annotations
            )
            ips = frozenset(map(sockets.plain, network.ips))
            found.append(planned(conf, described, network.netns, ips))
    return found


def of_processes(host_proc: Path, conf: NetConf) -> list[Pod]:
    """Without a runtime: each network namespace that a process is in, but the node's own.

    Nothing tells names and annotations then. A namespace in which somebody listens where Istio's
    Envoy does counts as a pod of the mesh.
    """
    return [
        _of_namespace(conf, process, inode)
        for inode, process in sorted(_namespaces(host_proc).items())
    ]


def _namespaces(host_proc: Path) -> dict[int, Path]:
    """A process of each network namespace, by the namespace's inode."""
    found: dict[int, Path] = {}
    for process in host_proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            found.setdefault((process / "ns/net").stat().st_ino, process)
    with contextlib.suppress(OSError):
        found.pop((host_proc / "1/ns/net").stat().st_ino, None)
    found.pop(Path("/proc/self/ns/net").stat().st_ino, None)
    return found


def _of_namespace(conf: NetConf, process: Path, inode: int) -> Pod:
    path = str(process / "ns/net")
    ips, in_mesh = frozenset[str](), False
    with contextlib.suppress(OSError):  # it has ended
        ips = frozenset(_addresses(path))
        listeners = {each.local[1] for each in sockets.dump(path).sockets if each.is_listener}
        in_mesh = bool(listeners & _ENVOY_PORTS)
    annotations = {names.SIDECAR_STATUS: "{}"} if in_mesh else {}
    described = policy.Pod("", f"netns-{inode}", "", annotations)
    return planned(conf, described, path, ips)


def _addresses(namespace: str) -> Iterator[str]:
    with netns.entered(namespace), IPRoute() as route:
        for each in route.get_addr():
            address = each.get_attr("IFA_ADDRESS")
            if (
                address
                and not address.startswith(("127.", "fe80:"))
                and address not in ("::1", "::6")
            ):
                yield sockets.plain(address)
