# SPDX-License-Identifier: Apache-2.0
"""A container runtime's side of CNI: what libcni does with a conflist.

After containernetworking/cni, libcni/api.go: plugins run in order on ADD and CHECK and in reverse
order on DEL, each with the conflist's name and version, the previous plugin's result, and those
parts of runtimeConfig that its capabilities ask for.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bed.netns import NetNamespace

Json = dict[str, Any]
PLUGIN_TIMEOUT_S = 60
IPV4 = ("10.244.0.0/16",)
DUAL_STACK = ("10.244.0.0/16", "fd00:10:244::/64")


@dataclass(frozen=True)
class Attachment:
    """One call's container: what the runtime knows of a sandbox."""

    container_id: str
    netns: NetNamespace
    pod_namespace: str
    pod_name: str
    pod_uid: str
    cgroup_path: str  # below the cgroup2 mount, with a leading slash
    annotations: dict[str, str]
    ifname: str = "eth0"

    @property
    def arguments(self) -> str:
        """CNI_ARGS as containerd writes it."""
        return (
            f"IgnoreUnknown=1;K8S_POD_UID={self.pod_uid};K8S_POD_NAMESPACE={self.pod_namespace};"
            f"K8S_POD_NAME={self.pod_name};K8S_POD_INFRA_CONTAINER_ID={self.container_id}"
        )

    @property
    def runtime_config(self) -> Json:
        """What a runtime passes to the plugins whose capabilities name the key."""
        return {
            "cgroupPath": self.cgroup_path,
            "io.kubernetes.cri.pod-annotations": self.annotations,
        }


class CniError(Exception):
    """A plugin answered with an error, or with something that is no answer."""

    def __init__(self, command: str, plugin: str, answer: str, stderr: str) -> None:
        super().__init__(f"{command} of plugin {plugin} failed: {answer.strip()} {stderr.strip()}")
        try:
            self.code: int | None = json.loads(answer)["code"]
        except (ValueError, KeyError, TypeError):
            self.code = None


@dataclass
class Chain:
    """A conflist and the results cached for its attachments, as in /var/lib/cni/results."""

    name: str
    plugins: Sequence[Json]
    plugin_dirs: Sequence[Path]
    host: NetNamespace
    cni_version: str = "1.0.0"
    results: dict[str, Json] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)  # the plugins' stderr, newest last

    def add(self, attachment: Attachment) -> Json:
        """ADD through the whole chain; the last plugin's result.

        Raises:
            CniError: a plugin failed; a runtime then calls delete().
        """
        result: Json | None = None
        for plugin in self.plugins:
            result = self._call("ADD", plugin, attachment, result)
        if result is None:
            raise CniError("ADD", self.name, "no result", "")
        self.results[attachment.container_id] = result
        return result

    def check(self, attachment: Attachment) -> None:
        """CHECK through the whole chain.

        Raises:
            CniError: a plugin found something wrong.
        """
        for plugin in self.plugins:
            self._call("CHECK", plugin, attachment, self.results[attachment.container_id])

    def delete(self, attachment: Attachment) -> None:
        """DEL through the chain in reverse, with the cached result if ADD got that far.

        Raises:
            CniError: a plugin failed; a runtime would call again.
        """
        result = self.results.get(attachment.container_id)
        for plugin in reversed(self.plugins):
            self._call("DEL", plugin, attachment, result)
        self.results.pop(attachment.container_id, None)

    def _call(
        self, command: str, plugin: Json, attachment: Attachment, prev_result: Json | None
    ) -> Json | None:
        conf = {**plugin, "name": self.name, "cniVersion": self.cni_version}
        wanted = {
            key: value
            for key, value in attachment.runtime_config.items()
            if plugin.get("capabilities", {}).get(key)
        }
        if wanted:
            conf["runtimeConfig"] = wanted
        if prev_result is not None:
            conf["prevResult"] = prev_result
        environment = {
            **os.environ,
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": str(attachment.netns.path),
            "CNI_IFNAME": attachment.ifname,
            "CNI_ARGS": attachment.arguments,
            "CNI_PATH": ":".join(map(str, self.plugin_dirs)),
        }
        with self.host.entered():
            done = subprocess.run(
                [self._program(plugin["type"])],
                input=json.dumps(conf),
                env=environment,
                text=True,
                capture_output=True,
                timeout=PLUGIN_TIMEOUT_S,
                start_new_session=True,  # Ctrl-C is for us; a DEL must go on
                check=False,
            )
        if done.stderr:
            self.said.append(f"{command} {plugin['type']}: {done.stderr.rstrip()}")
        if done.returncode != 0:
            raise CniError(command, plugin["type"], done.stdout, done.stderr)
        if command != "ADD":
            return None
        try:
            result: Json = json.loads(done.stdout)
        except ValueError as error:
            raise CniError(command, plugin["type"], done.stdout, str(error)) from error
        return result

    def _program(self, plugin_type: str) -> Path:
        """The first program of that name in the plugin folders.

        Raises:
            FileNotFoundError: none of them has it.
        """
        for folder in self.plugin_dirs:
            program = folder / plugin_type
            if program.is_file():
                return program
        where = ", ".join(map(str, self.plugin_dirs))
        raise FileNotFoundError(f"CNI plugin {plugin_type} is not in {where}; run `make setup`")


def bridge(data_dir: Path, subnets: Sequence[str] = IPV4, *, name: str = "cni0") -> Json:
    """A primary plugin: pods on one bridge with a gateway, an address of each subnet."""
    return {
        "type": "bridge",
        "bridge": name,
        "isGateway": True,
        "isDefaultGateway": True,
        "hairpinMode": True,
        "ipam": _host_local(data_dir, subnets),
    }


def ptp(data_dir: Path, subnets: Sequence[str]) -> Json:
    """A primary plugin without a bridge: every packet between pods is routed, as with Calico."""
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    families = {":" in subnet for subnet in subnets}
    ipam = _host_local(data_dir, subnets)
    ipam["routes"] = [route for route in routes if (":" in route["dst"]) in families]
    return {"type": "ptp", "ipam": ipam}


def _host_local(data_dir: Path, subnets: Sequence[str]) -> Json:
    return {
        "type": "host-local",
        "dataDir": str(data_dir),
        "ranges": [[{"subnet": subnet}] for subnet in subnets],
    }


def tcpip_bypass(bpffs: Path, state_dir: Path, conf: Mapping[str, Any] | None = None) -> Json:
    """Our entry, as the node program would append it to the conflist; `conf` adds to it."""
    return {
        "type": "tcpip-bypass",
        "capabilities": {"cgroupPath": True, "io.kubernetes.cri.pod-annotations": True},
        "bpffs": str(bpffs),
        "stateDir": str(state_dir),
        # The kernel of a machine that tests may have a bug for which the self-test decides on
        # less (6.18 before 2026-07: FIONREAD of TCP bytes). What is tested here is all of it.
        "mode": "full",
        **(conf or {}),
    }
