# SPDX-License-Identifier: Apache-2.0
"""A client of the Container Runtime Interface, for what kubelet does with a pod's sandbox."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from install.program.agent import cri
from install.program.agent.cri import CriError, Runtime, messages

__all__ = ["USUAL", "Cri", "CriError", "PodIdentity", "SandboxStatus", "Wishes", "connected"]

USERS = 65_536  # of a pod with a user namespace of its own, as kubelet has it


@dataclass(frozen=True)
class PodIdentity:
    """What kubelet tells the runtime about a pod; `attempt` counts its sandboxes from 0."""

    name: str
    uid: str
    cgroup_parent: str  # below the cgroup mounts, with a leading slash
    namespace: str = "default"
    attempt: int = 0


@dataclass(frozen=True)
class Wishes:
    """What else a pod's specification asks for."""

    host_network: bool = False
    host_port: int = 0  # leads to the same port of the pod
    root: int = 0  # the host's user that is the pod's root; 0: no user namespace of its own

    def namespaces(self) -> messages.NamespaceOption:
        network = messages.NODE if self.host_network else messages.POD
        if not self.root:
            return messages.NamespaceOption(network=network)
        ids = [messages.IDMapping(host_id=self.root, container_id=0, length=USERS)]
        users = messages.UserNamespace(mode=messages.POD, uids=ids, gids=ids)
        return messages.NamespaceOption(network=network, userns_options=users)

    def ports(self) -> list[messages.PortMapping]:
        if not self.host_port:
            return []
        return [messages.PortMapping(container_port=self.host_port, host_port=self.host_port)]


USUAL = Wishes()


@dataclass(frozen=True)
class SandboxStatus:
    """A sandbox as the runtime sees it; ip is empty on the host's network, pid 0 once it ended."""

    ready: bool
    ip: str
    pid: int


class Cri(Runtime):
    """One connection to a runtime; calls may come from several threads and raise CriError."""

    def conditions(self) -> dict[str, bool]:
        """RuntimeReady and NetworkReady; newer runtimes have others of their own beside them."""
        answer = self.call("Status", messages.StatusRequest())
        return {condition.type: condition.status for condition in answer.status.conditions}

    def is_ready(self) -> bool:
        """Whether kubelet would call the node ready."""
        conditions = self.conditions()
        return conditions["RuntimeReady"] and conditions["NetworkReady"]

    def run_sandbox(
        self,
        pod: PodIdentity,
        annotations: Mapping[str, str],
        wishes: Wishes,
        handler: str = "",
    ) -> str:
        """Make a pod's sandbox, network included; its container ID."""
        config = messages.PodSandboxConfig(
            metadata=messages.PodSandboxMetadata(
                name=pod.name, uid=pod.uid, namespace=pod.namespace, attempt=pod.attempt
            ),
            annotations=annotations,
            port_mappings=wishes.ports(),
            linux=messages.LinuxPodSandboxConfig(
                cgroup_parent=pod.cgroup_parent,
                security_context=messages.LinuxSandboxSecurityContext(
                    namespace_options=wishes.namespaces()
                ),
            ),
        )
        request = messages.RunPodSandboxRequest(config=config, runtime_handler=handler)
        sandbox_id: str = self.call("RunPodSandbox", request).pod_sandbox_id
        return sandbox_id

    def stop_sandbox(self, sandbox_id: str) -> None:
        """End the sandbox' processes and take its network down."""
        self.call("StopPodSandbox", messages.StopPodSandboxRequest(pod_sandbox_id=sandbox_id))

    def remove_sandbox(self, sandbox_id: str) -> None:
        """Remove what is left of it; containerd takes the network down once more."""
        self.call("RemovePodSandbox", messages.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id))

    def sandbox_status(self, sandbox_id: str) -> SandboxStatus:
        request = messages.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
        answer = self.call("PodSandboxStatus", request)
        return SandboxStatus(
            ready=answer.status.state == messages.SANDBOX_READY,
            ip=answer.status.network.ip,
            pid=json.loads(answer.info["info"])["pid"],
        )

    def sandbox_ids(self) -> list[str]:
        """The container IDs of all sandboxes, ended ones included."""
        return [sandbox.id for sandbox in self.sandboxes()]


@contextmanager
def connected(socket: Path) -> Iterator[Cri]:
    """A client of the runtime that listens on a Unix socket."""
    with cri.connected(socket) as channel:
        yield Cri(channel)
