# SPDX-License-Identifier: Apache-2.0
"""What runtimes tell about a sandbox, and the ADD that is made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cni_plugin import protocol, results
from install.agent import repair
from install.agent.cri import Network, Runtime, Sandbox, messages
from install.agent.repair import Plugin
from tests.bed.bed import REPOSITORY

NETNS = "/var/run/netns/cni-1"
SPEC = {"linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": NETNS}]}}
CONTAINERD = {"pid": 1, "runtimeSpec": SPEC, "config": {"linux": {"cgroup_parent": "/kubepods/p"}}}
CRI_O = {"pid": 1, "image": "pause", "runtimeSpec": SPEC}

ANNOTATIONS = {"sidecar.istio.io/status": "{}"}
CONFLIST = Path("/etc/cni/net.d/10-pods.conflist")
SANDBOX = Sandbox("0123", True, "shop", "cart-7d9", "u-i-d", ANNOTATIONS)
CAPABILITIES = {"cgroupPath": True, "io.kubernetes.cri.pod-annotations": True}


class Answering(Runtime):
    """A runtime that answers every call with this."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def call(self, *_: Any) -> Any:
        return self._answer


def network_of(info: dict[str, str], *ips: str, node: bool = False) -> Network:
    first, *others = ips or ("",)
    status = messages.PodSandboxStatus(
        network=messages.PodSandboxNetworkStatus(
            ip=first, additional_ips=[messages.PodIP(ip=each) for each in others]
        ),
        linux=messages.LinuxPodSandboxStatus(
            namespaces=messages.Namespace(
                options=messages.NamespaceOption(network=messages.NODE if node else messages.POD)
            )
        ),
    )
    answer = messages.PodSandboxStatusResponse(status=status, info=info)
    return Answering(answer).network("0123")


def test_containerd() -> None:
    found = network_of({"info": json.dumps(CONTAINERD)}, "10.0.0.2", "fd00::2")
    assert found == Network(True, False, ["10.0.0.2", "fd00::2"], NETNS, "/kubepods/p")


def test_cri_o_leaves_the_cgroup_to_the_plugin() -> None:
    found = network_of({"info": json.dumps(CRI_O)}, "10.0.0.2")
    assert found == Network(True, False, ["10.0.0.2"], NETNS, "")


@pytest.mark.parametrize(
    "info",
    [{}, {"info": ""}, {"info": "no JSON"}, {"info": "[]"}, {"info": '{"runtimeSpec": []}'}],
)
def test_a_runtime_that_tells_little(info: dict[str, str]) -> None:
    assert network_of(info, "10.0.0.2") == Network(True, False, ["10.0.0.2"], "", "")


def test_a_sandbox_on_the_hosts_network() -> None:
    assert network_of({}, "192.0.2.1", node=True).of_the_host


@pytest.mark.parametrize("version", ["0.3.0", "0.4.0", "1.0.0", "1.1.0"])
def test_the_call_is_one_that_the_plugin_understands(version: str) -> None:
    entry = {"type": "tcpip-bypass", "capabilities": CAPABILITIES, "scope": "mesh"}
    plugin = Plugin(Path("/opt/cni/bin/tcpip-bypass"), CONFLIST, "pods", version, entry)
    network = Network(True, False, ["10.0.0.2", "fd00::2"], NETNS, "/kubepods/pod-u-i-d")
    environment = repair.environment(plugin, SANDBOX, network)
    conf = json.dumps(repair.configuration(plugin, SANDBOX, network)).encode()
    call = protocol.parse_environment(environment)
    request = protocol.parse_request(call, protocol.decode(conf))
    assert (call.container_id, call.ifname, call.netns) == ("0123", "eth0", NETNS)
    assert call.args["K8S_POD_NAME"] == "cart-7d9"
    assert (request.version, request.name) == (version, "pods")
    answer = results.convert(results.previous(request), version)
    assert results.pod_addresses(answer, "eth0") == [("10.0.0.2", "eth0"), ("fd00::2", "eth0")]
    assert request.conf["scope"] == "mesh"
    assert request.conf["runtimeConfig"] == {
        "cgroupPath": "/kubepods/pod-u-i-d",
        "io.kubernetes.cri.pod-annotations": ANNOTATIONS,
    }


def test_the_runtime_config_is_what_the_entry_asks_for() -> None:
    plugin = Plugin(Path("/p"), CONFLIST, "pods", "1.0.0", {"capabilities": {"cgroupPath": True}})
    network = Network(True, False, ["10.0.0.2"], NETNS, "/kubepods/p")
    conf = repair.configuration(plugin, SANDBOX, network)
    assert conf["runtimeConfig"] == {"cgroupPath": "/kubepods/p"}


@pytest.mark.parametrize("module", ["cri_pb2.py", "cri_pb2_grpc.py"])
def test_the_messages_are_made_of_the_interface_as_it_is(module: str, tmp_path: Path) -> None:
    """They are made with the venv and the image, and no later change may be forgotten."""
    folder = REPOSITORY / "install" / "agent"
    subprocess.run([folder / "messages.sh", sys.executable, tmp_path], check=True)
    made = (tmp_path / "install" / "agent" / module).read_text()
    assert (folder / module).read_text() == made
