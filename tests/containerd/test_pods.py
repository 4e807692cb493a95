# SPDX-License-Identifier: Apache-2.0
"""What becomes of pods, one at a time. The fixture checks after each test that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bpf import bpfsys, pins
from cni_plugin import attachment
from cni_plugin.state import Attachment, Key, State
from tests.bed import OPTED_OUT
from tests.bed.node import PROGRAM
from tests.bed.pod import MESH
from tests.containerd import recordings
from tests.containerd.bed import FAILING, RECORDING, Pod, RuntimeBed
from tests.containerd.cri import CriError, Wishes
from tests.containerd.inventory import attached

OURS = [pins.SOCK_OPS_NAME]


# Time-outs make sockets O_NONBLOCK: neither a blocking reader joins nor one without TCP_NODELAY.
SERVER = """
import socket
socket.setdefaulttimeout(60)
listener = socket.create_server(("", 8080))
listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print("listening", flush=True)
connection, _ = listener.accept()
while data := connection.recv(64):
    connection.sendall(data)
"""
CLIENT = """
import socket, sys, threading
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set())).start()
connection = socket.create_connection((sys.argv[1], 8080), 60)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while not ended.wait(0.001):
    connection.sendall(bytes(64))
    connection.recv(64, socket.MSG_WAITALL)
"""
JOIN_WITHIN_S = 60


def owners(cgroup: Path) -> list[int]:
    """The attachments that the kernel's pod records on a cgroup belong to."""
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with bpfsys.closing(fd), attachment.attached(fd, cgroup.stat().st_ino) as found:
        return [each.record.id for each in found]


def record_of(bed: RuntimeBed, sandbox: str) -> Attachment | None:
    """Our plugin's record of a sandbox, if it has one."""
    return State(str(bed.state_dir)).read(Key(sandbox, "eth0"))


def assert_accelerated(bed: RuntimeBed, pod: Pod, sandbox: str) -> None:
    """The program on the pod's cgroup, its record in the kernel and ours say this sandbox."""
    record = record_of(bed, sandbox)
    assert record is not None
    assert record.pod_uid == pod.identity.uid
    assert record.cgroup == str(pod.cgroup)
    assert [address for address, _ in record.ips] == [bed.cri.sandbox_status(sandbox).ip]
    assert attached(pod.cgroup) == OURS
    assert owners(pod.cgroup) == [record.pod_id]


def test_a_mesh_pod_is_accelerated_as_long_as_its_sandbox_lives(bed: RuntimeBed) -> None:
    with bed.pod("mesh") as pod:
        sandbox = pod.run_sandbox()
        assert_accelerated(bed, pod, sandbox)
        bed.cri.stop_sandbox(sandbox)
        assert attached(pod.cgroup) == []
        assert record_of(bed, sandbox) is None
        bed.cri.remove_sandbox(sandbox)


@contextmanager
def joining(bed: RuntimeBed) -> Iterator[None]:
    """A joiner runs on the node meanwhile."""
    argv = bed.node.entering([PROGRAM, "join"])
    with subprocess.Popen(argv, start_new_session=True) as joiner:
        try:
            yield
        finally:
            os.killpg(joiner.pid, signal.SIGTERM)


def bypassed_by(bed: RuntimeBed, sandboxes: dict[str, str]) -> list[int]:
    """How many messages the pods have sent past TCP, by the names in ``sandboxes``."""
    pods = json.loads(bed.node_program("status", "--json"))["pods"]
    assert {pod["name"]: pod["container_id"] for pod in pods} == sandboxes
    return [pod["hops"].get("direct", {}).get("bypassed_messages", 0) for pod in pods]


def test_what_two_pods_say_to_each_other_bypasses_tcp(bed: RuntimeBed) -> None:
    with bed.pod("client") as client, bed.pod("server") as server:
        ends = {pod.identity.name: pod.run_sandbox() for pod in (client, server)}
        listen = server.entering(ends["server"], [sys.executable, "-c", SERVER])
        with subprocess.Popen(listen, stdout=subprocess.PIPE) as listener:
            assert listener.stdout is not None
            listener.stdout.readline()
            ip = bed.cri.sandbox_status(ends["server"]).ip
            argv = client.entering(ends["client"], [sys.executable, "-c", CLIENT, ip])
            with joining(bed), subprocess.Popen(argv, stdin=subprocess.PIPE) as asking:
                deadline = time.monotonic() + JOIN_WITHIN_S
                while not all(bypassed := bypassed_by(bed, ends)):
                    assert time.monotonic() < deadline, bypassed
                asking.communicate()
            assert asking.returncode == 0
        # What the other tests find nothing of is to be found here.
        added = bed.added()
        assert added.pop("failure notes") == []
        assert all(added.values()), added
        bed.end_all_sandboxes()


@pytest.mark.parametrize("annotations", [{}, {**MESH, **OPTED_OUT}], ids=["plain", "opted out"])
def test_a_pod_that_is_not_ours_is_left_alone(bed: RuntimeBed, annotations: dict[str, str]) -> None:
    with bed.pod("other", annotations=annotations) as pod:
        sandbox = pod.run_sandbox()
        assert bed.cri.sandbox_status(sandbox).ip
        assert attached(pod.cgroup) == []
        assert record_of(bed, sandbox) is None
        pod.end_sandbox(sandbox)


def test_every_call_that_containerd_makes_is_answered_well(bed: RuntimeBed) -> None:
    with bed.pod("recorded", handler=RECORDING) as pod:
        sandbox = pod.run_sandbox()
        pod.end_sandbox(sandbox)
    calls = [call for call in recordings.read(bed.calls) if call.container_id == sandbox]
    assert [(call.command, call.plugin) for call in calls] == [
        ("ADD", "bridge"),
        ("ADD", "tcpip-bypass"),
        ("DEL", "tcpip-bypass"),  # StopPodSandbox
        ("DEL", "bridge"),
        ("DEL", "tcpip-bypass"),  # RemovePodSandbox
        ("DEL", "bridge"),
    ]
    assert [call.code for call in calls] == [0] * len(calls)
    assert not any("not accelerated" in call.stderr for call in calls)
    for call in calls:
        assert call.arguments["K8S_POD_UID"] == pod.identity.uid
    bridge, ours, *_ = calls
    passed = ours.conf["runtimeConfig"]
    assert passed["io.kubernetes.cri.pod-annotations"] == MESH
    assert passed.get("cgroupPath", pod.identity.cgroup_parent) == pod.identity.cgroup_parent
    assert ours.conf["prevResult"]["ips"] == json.loads(bridge.stdout)["ips"]
    assert json.loads(ours.stdout) == ours.conf["prevResult"]


def test_the_end_of_a_dead_sandbox_does_not_touch_its_successor(bed: RuntimeBed) -> None:
    with bed.pod("again") as pod:
        first = pod.run_sandbox()
        os.kill(bed.cri.sandbox_status(first).pid, signal.SIGKILL)
        second = pod.run_sandbox(attempt=1)
        assert_accelerated(bed, pod, second)
        bed.cri.stop_sandbox(first)
        assert record_of(bed, first) is None
        assert_accelerated(bed, pod, second)
        bed.cri.remove_sandbox(first)
        assert_accelerated(bed, pod, second)
        bed.cri.stop_sandbox(second)
        assert attached(pod.cgroup) == []
        bed.cri.remove_sandbox(second)


def test_a_pod_on_the_hosts_network_never_reaches_cni(bed: RuntimeBed) -> None:
    with bed.pod("host", wishes=Wishes(host_network=True), handler=RECORDING) as pod:
        sandbox = pod.run_sandbox()
        assert bed.cri.sandbox_status(sandbox).ready
        assert attached(pod.cgroup) == []
        pod.end_sandbox(sandbox)
    assert sandbox not in {call.container_id for call in recordings.read(bed.calls)}


def test_add_is_undone_when_a_later_plugin_fails(bed: RuntimeBed) -> None:
    with bed.pod("unlucky", handler=FAILING) as pod:
        for attempt in range(3):  # as kubelet goes on trying
            with pytest.raises(CriError, match="this plugin always fails"):
                pod.run_sandbox(attempt)
            assert attached(pod.cgroup) == []
