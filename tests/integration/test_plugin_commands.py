# SPDX-License-Identifier: Apache-2.0
"""The frozen plugin's commands on a real kernel, one pod at a time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace

import pyroute2
import pytest

from bpf import abi, bpfsys, pins
from cni_plugin import attachment, names
from cni_plugin.state import State
from tests.bed import cgroups, open_bed
from tests.bed.bed import Bed
from tests.integration import plugin_calls
from tests.integration.plugin_calls import Sandbox


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with open_bed() as made:
        yield made


@pytest.fixture
def pod(bed: Bed) -> Iterator[Sandbox]:
    with plugin_calls.sandbox(bed, "commands") as made:
        yield made
        made.call("GC")


def must(pod: Sandbox, command: str) -> None:
    answer = pod.call(command)
    assert answer.exit == 0, answer
    assert not answer.stdout or command == "ADD"


def test_add_check_del(pod: Sandbox) -> None:
    answer = pod.call("ADD")
    assert (answer.exit, answer.document) == (0, pod.result)
    assert pod.owners() == [pod.pod_id]
    must(pod, "CHECK")
    pod.count_something()
    must(pod, "DEL")
    assert pod.leftovers() == []
    must(pod, "DEL")


@pytest.mark.parametrize(("of_pod", "proxy_uid"), [([], 4242), (["1000680001"], 1_000_680_001)])
def test_add_writes_the_record_the_programs_read(
    pod: Sandbox, of_pod: list[str], proxy_uid: int
) -> None:
    annotated = replace(
        pod,
        annotations=(
            (names.SIDECAR_STATUS, "{}"),
            (names.PROXY_ONLY, "true"),
            (names.EXCLUDE_PORTS, "3306,8000-8100"),
            *((names.PROXY_UID_OF_POD, each) for each in of_pod),
        ),
        conf=(
            ("proxyUID", 4242),
            ("proxyUIDs", ["1000680000-1000689999"]),
            ("excludePorts", [22]),
        ),
    )
    must(annotated, "ADD")
    inode = pod.cgroup.stat().st_ino
    generation = attachment.current_generation(str(pod.bed.node.bpffs))
    with bpfsys.closing(generation.open(pins.PODS)) as pods_fd:
        record = attachment.read_record(pods_fd, inode)
    forced = abi.POD_PROXY_ONLY | abi.POD_FORCED  # the testbed's configuration forces a mode
    assert (record.id, record.flags, record.proxy_uid) == (pod.pod_id, forced, proxy_uid)
    assert record.ip_count == 1
    assert [(r.first, r.last) for r in record.excluded[: record.excluded_count]] == [
        (22, 22),
        (3306, 3306),
        (8000, 8100),
    ]
    must(annotated, "CHECK")
    must(annotated, "DEL")


def test_sandbox_recreation(pod: Sandbox) -> None:
    """containerd DELs the old container ID while the new sandbox runs in the same cgroup."""
    second = pod.again("commands-1")
    must(pod, "ADD")
    must(second, "ADD")
    pod.count_something()
    for _ in range(2):
        must(pod, "DEL")
        assert second.owners() == [second.pod_id]
        assert pod.counted_hops() == []
    must(second, "CHECK")
    must(second, "DEL")
    assert second.leftovers() == []


def test_gc_after_recreation(pod: Sandbox) -> None:
    """The old sandbox's DEL never came: its record goes, the new one's attachment stays."""
    second = pod.again("commands-1")
    must(pod, "ADD")
    must(second, "ADD")
    valid = [{"containerID": second.container_id, "ifname": second.ifname}]
    must(replace(pod, conf=((names.VALID_ATTACHMENTS, valid),)), "GC")
    assert not pod.recorded()
    must(second, "CHECK")
    must(pod, "GC")
    assert second.leftovers() == []


def test_gc_leaves_other_networks_alone(pod: Sandbox) -> None:
    must(pod, "ADD")
    must(replace(pod, conf=(("name", "another-network"),)), "GC")
    must(pod, "CHECK")
    must(pod, "DEL")


def test_add_repeated_without_del(pod: Sandbox) -> None:
    must(pod, "ADD")
    must(pod, "ADD")
    assert pod.owners() == [pod.pod_id]
    must(pod, "DEL")
    assert pod.leftovers() == []


def test_second_interface_of_a_pod_is_passed_through(pod: Sandbox) -> None:
    """One cgroup, one record: the first interface's. The other's connections stay on TCP."""
    net1 = replace(pod, ifname="net1", ip="10.251.0.7")
    must(pod, "ADD")
    answer = net1.call("ADD")
    assert (answer.exit, answer.document) == (0, net1.result)
    assert "interface eth0 of the same pod" in answer.stderr
    must(net1, "DEL")
    must(pod, "CHECK")
    must(pod, "DEL")


def test_another_program_on_the_cgroup_stays(pod: Sandbox) -> None:
    """Somebody else's sock_ops program is neither taken for ours nor detached."""
    cgroup = os.open(pod.cgroup, os.O_RDONLY | os.O_DIRECTORY)
    with bpfsys.closing(load_foreign()) as foreign, bpfsys.closing(cgroup):
        bpfsys.prog_attach(foreign, cgroup)
        must(pod, "ADD")
        assert len(bpfsys.prog_query(cgroup)) == 2
        must(pod, "DEL")
        assert bpfsys.prog_query(cgroup) == [bpfsys.prog_info(foreign).id]
        bpfsys.prog_detach(foreign, cgroup)


def test_a_new_generation_replaces_the_old_one(pod: Sandbox) -> None:
    must(pod, "ADD")
    first = State(str(pod.bed.node.state_dir)).read(pod.key)
    pod.bed.node.load()
    must(pod, "ADD")
    second = State(str(pod.bed.node.state_dir)).read(pod.key)
    assert first is not None
    assert second is not None
    assert first.generation != second.generation
    assert pod.owners() == [pod.pod_id]
    must(pod, "CHECK")
    must(pod, "DEL")


@pytest.mark.parametrize("record", [b"", b'{"container_id"', None])
def test_del_without_a_good_record(pod: Sandbox, record: bytes | None) -> None:
    """Torn or lost: the request's cgroup and the kernel's own record are enough."""
    must(pod, "ADD")
    path = pod.bed.node.state_dir / names.ATTACHMENTS / f"{pod.container_id}:eth0.json"
    if record is None:
        path.unlink()
    else:
        path.write_bytes(record)
    must(pod, "DEL")
    assert pod.leftovers() == []


def test_del_without_the_namespace(pod: Sandbox) -> None:
    must(pod, "ADD")
    pyroute2.netns.remove(pod.netns.name)
    must(pod, "DEL")
    assert pod.leftovers() == []


def test_del_without_the_cgroup(pod: Sandbox) -> None:
    must(pod, "ADD")
    cgroups.remove(pod.cgroup)
    must(pod, "DEL")
    assert not pod.recorded()
    pod.cgroup.mkdir()


def test_del_when_another_pod_has_the_cgroups_path(pod: Sandbox) -> None:
    """The path alone proves nothing: the inode is another."""
    must(pod, "ADD")
    cgroups.remove(pod.cgroup)
    pod.cgroup.mkdir()
    second = pod.again("commands-1")
    must(second, "ADD")
    must(pod, "DEL")
    assert second.owners() == [second.pod_id]
    must(second, "DEL")


def test_check_says_what_is_missing(pod: Sandbox) -> None:
    must(pod, "ADD")
    with pod.netns.entered(), pyroute2.IPRoute() as route:
        index = route.link_lookup(ifname="eth0")[0]
        route.addr("del", index=index, address=pod.ip, prefixlen=24)
    assert _missing(pod) == f"address {pod.ip} is not on interface eth0 in {pod.netns.path}"
    with pod.netns.entered(), pyroute2.IPRoute() as route:
        route.addr("add", index=index, address=pod.ip, prefixlen=24)
    must(pod, "CHECK")
    second = pod.again("commands-1")
    must(second, "ADD")
    assert "for another attachment of this pod" in _missing(pod)
    must(pod, "ADD")
    assert "for another attachment of this pod" in _missing(second)
    must(second, "DEL")
    record = State(str(pod.bed.node.state_dir)).read(pod.key)
    assert record is not None
    attachment.take_out(record.cgroup, record.inode, record.pod_id)
    assert f"no sock_ops program is attached to cgroup {pod.cgroup}" in _missing(pod)


def test_check_compares_the_whole_record(pod: Sandbox) -> None:
    must(pod, "ADD")
    state = State(str(pod.bed.node.state_dir))
    record = state.read(pod.key)
    assert record is not None
    state.write(record._replace(proxy_uid=1))
    assert "differs from ADD's" in _missing(pod)


def _missing(pod: Sandbox) -> str:
    answer = pod.call("CHECK")
    assert answer.exit == 1, answer
    assert answer.document["code"] == 100
    return str(answer.document["details"])


def test_without_pins(pod: Sandbox) -> None:
    """As after a reboot: STATUS says so, and ADD passes the pod through."""
    must(pod, "STATUS")
    current = pod.bed.node.bpffs / pins.CURRENT
    target = current.readlink()
    current.unlink()
    try:
        answer = pod.call("STATUS")
        assert (answer.exit, answer.stdout) == (0, "")
        assert str(current) in answer.stderr
        answer = pod.call("ADD")
        assert (answer.exit, answer.document) == (0, pod.result)
        assert "the programs are not loaded" in answer.stderr
        assert pod.owners() == []
        assert not pod.recorded()
    finally:
        current.symlink_to(target)


def test_del_without_pins(pod: Sandbox) -> None:
    """The program on the cgroup knows its maps."""
    must(pod, "ADD")
    hidden = pod.bed.node.bpffs.with_name("hidden")
    pod.bed.node.bpffs.rename(hidden)
    try:
        must(pod, "DEL")
    finally:
        hidden.rename(pod.bed.node.bpffs)
    assert pod.leftovers() == []


def load_foreign() -> int:
    """A sock_ops program of somebody else: `return 1`."""
    instructions = ctypes.create_string_buffer(bytes.fromhex("b700000001000000 9500000000000000"))
    licence = ctypes.create_string_buffer(b"GPL")
    attr = bpfsys._attr(
        "=IIQQIIQII16s",
        *(13, 2, ctypes.addressof(instructions), ctypes.addressof(licence)),
        *(0, 0, 0, 0, 0, b"somebody_elses"),
    )
    return bpfsys._bpf(5, attr)  # BPF_PROG_LOAD of BPF_PROG_TYPE_SOCK_OPS, linux/bpf.h
