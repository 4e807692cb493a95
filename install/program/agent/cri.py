# SPDX-License-Identifier: Apache-2.0
"""A client of the container runtime: which sandboxes there are, and how they are networked.

The messages are made of cri.proto by ``messages.sh``, with the venv and with the image. With
grpcio they take 22 MB, so the agent leaves this module to a child.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from install.program.agent import cri_pb2 as messages
from install.program.agent import cri_pb2_grpc as services

__all__ = ["CriError", "Network", "Runtime", "Sandbox", "connected", "messages"]

CALL_TIMEOUT_S = 60
_OPTIONS = [
    # A runtime that has been killed is back within a second or two, and somebody waits for it.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
    # The kubelet's limit: the list of a full node's sandboxes passes grpc's own 4 MiB.
    ("grpc.max_receive_message_length", 16 * 2**20),
]


@dataclass(frozen=True)
class Sandbox:
    """One entry of the runtime's list; those that have ended are in it until they are removed."""

    id: str
    ready: bool
    pod_namespace: str
    pod_name: str
    pod_uid: str
    annotations: dict[str, str]


@dataclass(frozen=True)
class Network:
    """How a sandbox was set up; what the runtime does not tell is empty."""

    ready: bool
    of_the_host: bool
    ips: list[str]  # without prefix length
    netns: str
    cgroup_parent: str


class CriError(Exception):
    """The runtime refused or failed a call, or could not be reached."""


class Runtime:
    """One connection to a runtime; calls may come from several threads and raise CriError."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._service = services.RuntimeServiceStub(channel)

    def version(self) -> str:
        """Its name and version, as in "containerd v2.1.4"."""
        answer = self.call("Version", messages.VersionRequest())
        return f"{answer.runtime_name} {answer.runtime_version}"

    def sandboxes(self) -> list[Sandbox]:
        """All of them, ended ones included."""
        answer = self.call("ListPodSandbox", messages.ListPodSandboxRequest())
        return [
            Sandbox(
                id=item.id,
                ready=item.state == messages.SANDBOX_READY,
                pod_namespace=item.metadata.namespace,
                pod_name=item.metadata.name,
                pod_uid=item.metadata.uid,
                annotations=dict(item.annotations),
            )
            for item in answer.items
        ]

    def network(self, sandbox_id: str) -> Network:
        """Addresses by the interface; the rest from what containerd and CRI-O add when verbose."""
        request = messages.PodSandboxStatusRequest(pod_sandbox_id=sandbox_id, verbose=True)
        answer = self.call("PodSandboxStatus", request)
        info = _object(answer.info.get("info"))
        status = answer.status
        addresses = [status.network.ip, *(each.ip for each in status.network.additional_ips)]
        return Network(
            ready=status.state == messages.SANDBOX_READY,
            of_the_host=status.linux.namespaces.options.network == messages.NODE,
            ips=[address for address in addresses if address],
            netns=_netns(info),
            cgroup_parent=str(_below(info, "config", "linux").get("cgroup_parent", "")),
        )

    def call(self, method: str, request: Any) -> Any:
        """One call of the interface; the answer is the method's message."""
        try:
            return getattr(self._service, method)(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise CriError(f"{method}: {error.code().name}: {error.details()}") from error


def _object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _below(document: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The object under these keys, one in the other; empty when it is not there."""
    for key in keys:
        found = document.get(key)
        document = found if isinstance(found, dict) else {}
    return document


def _netns(info: dict[str, Any]) -> str:
    """The network namespace in the sandbox' OCI configuration: config-linux.md, Namespaces."""
    namespaces = _below(info, "runtimeSpec", "linux").get("namespaces") or []
    return next((each.get("path", "") for each in namespaces if each.get("type") == "network"), "")


@contextmanager
def connected(socket: Path) -> Iterator[grpc.Channel]:
    """A channel to the runtime that listens on a Unix socket; connects with the first call."""
    with grpc.insecure_channel(f"unix:{socket}", _OPTIONS) as channel:
        yield channel
