"""A client of the Container Runtime Interface, for what kubelet does with a pod's sandbox.

grpcio compiles cri.proto when this module is imported (grpcio-tools brings the compiler): the
messages stay readable next to the interface they are taken from, and there is no generated file
to keep in step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

_messages, _services = grpc.protos_and_services("tests/containerd/cri.proto")
CALL_TIMEOUT_S = 60
# A runtime that has been killed is back within a second or two, and somebody waits for it.
RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
]


@dataclass(frozen=True)
class PodIdentity:
    """What kubelet tells the runtime about a pod; `attempt` counts its sandboxes from 0."""

    name: str
    uid: str
    cgroup_parent: str  # below the cgroup mounts, with a leading slash
    namespace: str = "default"
    attempt: int = 0


@dataclass(frozen=True)
class SandboxStatus:
    """A sandbox as the runtime sees it; ip is empty on the host's network, pid 0 once it ended."""

    ready: bool
    ip: str
    pid: int


class CriError(Exception):
    """The runtime refused or failed a call, or could not be reached."""


class Cri:
    """One connection to a runtime; calls may come from several threads."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._runtime = _services.RuntimeServiceStub(channel)

    def conditions(self) -> dict[str, bool]:
        """RuntimeReady and NetworkReady.

        Raises:
            CriError: see the class; so with every call.
        """
        answer = self._call("Status", _messages.StatusRequest())
        return {condition.type: condition.status for condition in answer.status.conditions}

    def run_sandbox(
        self,
        pod: PodIdentity,
        annotations: Mapping[str, str],
        *,
        host_network: bool = False,
        handler: str = "",
    ) -> str:
        """Make a pod's sandbox, network included; its container ID."""
        network = _messages.NODE if host_network else _messages.POD
        config = _messages.PodSandboxConfig(
            metadata=_messages.PodSandboxMetadata(
                name=pod.name, uid=pod.uid, namespace=pod.namespace, attempt=pod.attempt
            ),
            annotations=annotations,
            linux=_messages.LinuxPodSandboxConfig(
                cgroup_parent=pod.cgroup_parent,
                security_context=_messages.LinuxSandboxSecurityContext(
                    namespace_options=_messages.NamespaceOption(network=network)
                ),
            ),
        )
        request = _messages.RunPodSandboxRequest(config=config, runtime_handler=handler)
        sandbox_id: str = self._call("RunPodSandbox", request).pod_sandbox_id
        return sandbox_id

    def stop_sandbox(self, sandbox_id: str) -> None:
        """End the sandbox' processes and take its network down."""
        self._call("StopPodSandbox", _messages.StopPodSandboxRequest(pod_sandbox_id=sandbox_id))

    def remove_sandbox(self, sandbox_id: str) -> None:
        """Remove what is left of it; containerd takes the network down once more."""
        self._call("RemovePodSandbox", _messages.RemovePodSandboxRequest(pod_sandbox_id=sandbox_id))

    def sandbox_status(self, sandbox_id: str) -> SandboxStatus:
        request = _messages.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
        answer = self._call("PodSandboxStatus", request)
        return SandboxStatus(
            ready=answer.status.state == _messages.SANDBOX_READY,
            ip=answer.status.network.ip,
            pid=json.loads(answer.info["info"])["pid"],
        )

    def sandboxes(self) -> list[str]:
        """The container IDs of all sandboxes, ended ones included."""
        answer = self._call("ListPodSandbox", _messages.ListPodSandboxRequest())
        return [sandbox.id for sandbox in answer.items]

    def _call(self, method: str, request: Any) -> Any:
        try:
            return getattr(self._runtime, method)(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise CriError(f"{method}: {error.code().name}: {error.details()}") from error


@contextmanager
def connected(socket: Path) -> Iterator[Cri]:
    """A client of the runtime that listens on a Unix socket."""
    with grpc.insecure_channel(f"unix:{socket}", RECONNECT) as channel:
        yield Cri(channel)
