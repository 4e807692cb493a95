# SPDX-License-Identifier: Apache-2.0
"""What runtimes tell about a sandbox, and the ADD that is made of it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from bpf import bpfsys
from cni_plugin import names, protocol, results
from cni_plugin.state import Key
from install.program import exits, host, log, report
from install.program import status as tables
from install.program.agent import repair
from install.program.agent.agent import Agent, Settings
from install.program.agent.cri import Network, Runtime, Sandbox, messages
from install.program.agent.http import Health
from install.program.agent.metrics import Metrics
from install.program.agent.repair import YOUNG_S, Plugin, Tally, collect
from install.program.check import node as of_node
from install.program.check import pods
from install.program.conf_dir import ConfDir, Ours
from install.program.conflist import Entry
from install.program.generations import Generation, Generations
from install.program.host import OWN_PROC
from install.program.installer import Places
from install.program.node import Node
from install.program.pods import has_cgroup
from tests.bed import cgroups
from tests.bed.bed import REPOSITORY
from tests.unit.test_attachment import BLANK
from tests.unit.test_check import WELL

NETNS = "/var/run/netns/cni-1"
SPEC = {"linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": NETNS}]}}
CONTAINERD = {"pid": 1, "runtimeSpec": SPEC, "config": {"linux": {"cgroup_parent": "/kubepods/p"}}}
CRI_O = {"pid": 1, "image": "pause", "runtimeSpec": SPEC}

ANNOTATIONS = {"sidecar.istio.io/status": "{}"}
CONFLIST = Path("/etc/cni/net.d/10-pods.conflist")
GONE = Path("/sys/fs/cgroup/no-such-pod")
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
    folder = REPOSITORY / "install" / "program" / "agent"
    subprocess.run([folder / "messages.sh", sys.executable, tmp_path], check=True)
    made = (tmp_path / "install" / "program" / "agent" / module).read_text()
    assert (folder / module).read_text() == made


def record(node: Node, name: str, age_s: float, cgroup: Path = GONE) -> Path:
    """An attachment of that age; the pod's cgroup is gone unless it is given."""
    made = BLANK._replace(container_id=name, ifname="eth0", network="pods", cgroup=str(cgroup))
    if cgroup.exists():
        made = made._replace(inode=cgroup.stat().st_ino)
    node.state.make()
    node.state.write(made)
    path = node.state_dir / names.ATTACHMENTS / f"{name}:eth0.json"
    os.utime(path, (time.time() - age_s, time.time() - age_s))
    return path


@pytest.mark.parametrize("attached", [0, 1])
def test_what_a_killed_runtime_leaves_goes_when_it_is_no_longer_young(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attached: int
) -> None:
    """Their records were made just now, and no event wakes the agent when they are older."""
    node = Node(tmp_path / "bpffs", tmp_path / "state")
    old, young = (
        record(node, name, age, cgroup=cgroups.mount_point())
        for name, age in (("old", YOUNG_S + 1), ("young", 0.7 * YOUNG_S))
    )
    known = record(node, "0123", 0)
    tally = Tally(attached=attached)
    collect(node, "pods", [SANDBOX], tally)
    assert (old.exists(), young.exists(), known.exists()) == (False, True, True)
    assert 0.2 * YOUNG_S < tally.young_s <= 0.3 * YOUNG_S + 1
    agent = agent_of(node, tmp_path)
    agent._runtime = (tmp_path, 1, 0)
    monkeypatch.setattr(ConfDir, "ours", lambda _: Ours(CONFLIST, "pods", "1.0.0", {}))
    monkeypatch.setattr(agent, "_child", lambda *_: json.dumps(asdict(tally)))
    task, now = agent._sandboxes, time.monotonic()
    assert task.run(lambda: now) is None
    if attached:  # its own pause is shorter than that
        assert task.due - now == pytest.approx(task.first_pause_s)
    else:
        assert tally.young_s < task.due - now < tally.young_s + 1
    os.utime(young, (0, 0))
    tally = Tally()
    collect(node, "pods", [SANDBOX], tally)
    assert (young.exists(), known.exists()) == (False, True)
    task.run(lambda: now)
    assert task.due - now == pytest.approx(task.every_s)


def test_records_of_a_network_that_was_renamed(tmp_path: Path) -> None:
    """Or of another runtime, which ends its own pods while they are there."""
    node = Node(tmp_path / "bpffs", tmp_path / "state")
    gone = record(node, "gone", YOUNG_S + 1)
    there = record(node, "there", YOUNG_S + 1, cgroup=cgroups.mount_point())
    collect(node, "renamed", [], Tally())
    assert (gone.exists(), there.exists()) == (False, True)


def agent_of(node: Node, folder: Path, *cri_sockets: Path) -> Agent:
    places = Places(folder, folder, folder, OWN_PROC)
    settings = Settings(places, Entry({}, {}), [], [], [], cri_sockets, None, None, once=True)
    return Agent(node, settings, Metrics(node), Health())


def test_a_runtime_that_was_started_again_is_asked_at_once(tmp_path: Path) -> None:
    """Its new socket may have the old one's inode, as ext4 gives it."""
    path = tmp_path / "cri.sock"
    agent = agent_of(Node(tmp_path / "bpffs", tmp_path / "state"), tmp_path, path)
    for is_new in (True, False, True):
        if is_new:
            path.unlink(missing_ok=True)
            time.sleep(0.02)  # the kernel's clock for files ticks
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        agent._sandboxes.due = math.inf
        agent._look_at_runtime()
        assert (agent._sandboxes.due < math.inf) == is_new


def test_a_runtime_that_cannot_be_asked_is_counted(tmp_path: Path) -> None:
    path, ours = tmp_path / "cri.sock", {"type": names.PLUGIN}
    conflist = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}, ours]}
    (tmp_path / "10-pods.conflist").write_text(json.dumps(conflist))
    agent = agent_of(Node(tmp_path / "bpffs", tmp_path / "state"), tmp_path, path)
    options = ["--cni-conf-dir", str(tmp_path), "--state-dir", str(tmp_path / "state")]
    agent._settings = replace(agent._settings, gc_options=options)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    agent._look_at_runtime()
    failure = agent._sandboxes.run(time.monotonic)
    server.stop(None).wait()
    assert "UNIMPLEMENTED" in str(failure)
    failed = 'tcpip_bypass_repair_errors_total{what="sandbox"}'
    assert f"{failed} 1.0" in agent._metrics.render().decode()


@pytest.mark.parametrize("which", ["conf_dir", "bin_dir", "state_dir", "cri_sockets"])
def test_a_folder_that_was_made_anew_ends_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """A pod that is started again is given the new one."""
    said = list[str]()
    monkeypatch.setattr(log, "error", lambda event, *_, **__: said.append(event))
    (tmp_path / "old").mkdir()
    with bpfsys.closing(os.open(tmp_path / "old", os.O_RDONLY)) as fd:
        (tmp_path / "old").rmdir()  # as a bind mount has it
        old = Path(f"/proc/self/fd/{fd}")
        state_dir = old if which == "state_dir" else tmp_path / "state"
        sockets = [old / "cri.sock"] if which == "cri_sockets" else []
        agent = agent_of(Node(tmp_path / "bpffs", state_dir), tmp_path, *sockets)
        if which in ("conf_dir", "bin_dir"):
            places = replace(agent._settings.places, **{which: old})
            agent._settings = replace(agent._settings, places=places)
        assert agent.run(None) == 1
    assert said == ["folder_gone"]


def test_a_mount_of_the_node_need_not_be_text(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    lines = Path("/proc/self/mountinfo").read_bytes()
    odd = b"999 1 0:99 / /mnt/caf\xe9\x0b\xe2\x80\xa8 rw - tmpfs tmpfs rw\n"
    (tmp_path / "1/mountinfo").write_bytes(odd + lines)
    assert host._mounts(tmp_path / "1")[0].point == Path("/mnt/caf\udce9\v\u2028")


def test_a_record_of_the_clocks_future_is_young_for_so_long_and_no_longer(tmp_path: Path) -> None:
    node, tally = Node(tmp_path / "bpffs", tmp_path / "state"), Tally()
    record(node, "future", -10 * YOUNG_S, cgroup=cgroups.mount_point())
    collect(node, "pods", [], tally)
    assert (tally.removed, tally.young_s) == (0, YOUNG_S)


def test_a_record_whose_cgroup_is_gone_is_never_young(tmp_path: Path) -> None:
    node, tally = Node(tmp_path / "bpffs", tmp_path / "state"), Tally()
    ended, known = record(node, "ended", 0), record(node, "0123", 0)
    collect(node, "pods", [SANDBOX], tally)
    assert (ended.exists(), known.exists()) == (False, True)
    assert (tally.removed, tally.young_s) == (1, 0)


def test_a_pod_that_runs_under_another_runtime_keeps_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, tally = Node(tmp_path / "bpffs", tmp_path / "state"), Tally()
    monkeypatch.setattr(
        repair, "programs_of", lambda each: each.container_id != "forgotten" and [7]
    )
    (tmp_path / "cgroup.events").write_text("populated 1\n")
    running = record(node, "running", YOUNG_S + 1, cgroup=tmp_path)
    # Of processes the root cgroup does not tell.
    empty, forgotten = (
        record(node, name, YOUNG_S + 1, cgroup=cgroups.mount_point())
        for name in ("empty", "forgotten")
    )
    collect(node, "pods", [SANDBOX], tally)
    assert (running.exists(), empty.exists(), forgotten.exists()) == (True, False, False)
    assert (tally.removed, tally.failed) == (2, 0)


def test_pods_with_older_connections_are_taken_in_until_it_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, taken = Node(tmp_path / "bpffs", tmp_path / "state"), list[str]()

    class Runner:
        def take_in(self, _program: int, folder: Path) -> int:
            taken.append(folder.name)
            if folder.name == "odd":
                raise EOFError
            if folder.name == "last":
                raise KeyboardInterrupt
            return 1

        def close(self) -> None:
            pass

    monkeypatch.setattr(repair, "Runner", Runner)
    monkeypatch.setattr(repair, "opened", lambda _: nullcontext(0))
    monkeypatch.setattr(repair, "takes_in", lambda _: True)
    keys = list[Key]()
    for name in ("first", "odd", "last"):
        record(node, name, 0, cgroup=tmp_path / name)
        state = node.state.read(Key(name, "eth0"))
        assert state is not None
        node.state.write(state._replace(pod_id=len(keys) + 1))
        keys.append(Key(name, "eth0"))
    current = Generation(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        repair.take_in(node, current, keys, None)
    assert taken == ["first", "odd", "last"]
    assert repair._waiting(node) is None  # it was broken off
    repair.take_in(node, current, keys[:2], None)
    assert taken[3:] == ["first", "odd"]
    waiting = repair._waiting(node)
    assert waiting == {2}
    repair.take_in(node, current, keys[:2], waiting)
    assert taken[5:] == ["odd"]


def test_a_pod_that_was_added_just_now_is_taken_in_also_by_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path / "bpffs", tmp_path / "state")
    record(node, "added", 0)
    repair._write_waiting(node, [])
    current: Any = SimpleNamespace(sock_ops_id=lambda: 1)
    monkeypatch.setattr(Generations, "current", lambda _: current)
    monkeypatch.setattr(Generations, "complete", lambda _: [current])
    attached = [True, False]
    for name, stub in {
        "_in_force": lambda *_: SimpleNamespace(conf=None),
        "_plan": lambda *_: "a plan",
        "_is_attached": lambda *_: attached.pop(),
        "_add": lambda *_: "",
        "take_in": lambda *_: pytest.exit("it is ended"),
    }.items():
        monkeypatch.setattr(repair, name, stub)
    sandbox = Sandbox("added", True, "shop", "cart", "uid", {})
    some: Any = None
    with pytest.raises(pytest.exit.Exception):
        repair.adopt(node, some, some, [sandbox], Tally())
    assert repair._waiting(node) == {BLANK.pod_id}


def test_programs_of_an_older_version_take_in_no_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "takes_in", lambda _: True)
    node = Node(tmp_path / "bpffs", tmp_path / "state")
    record(node, "pod", 0)
    for waiting in (None, {BLANK.pod_id}):
        repair.take_in(node, Generation(tmp_path / "gen-1"), [Key("pod", "eth0")], waiting)
        assert repair._waiting(node) == {BLANK.pod_id}


def test_one_cgroup_that_cannot_be_opened_keeps_no_other_record(tmp_path: Path) -> None:
    node, tally = Node(tmp_path / "bpffs", tmp_path / "state"), Tally()
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    odd = record(node, "odd", 0)
    odd.write_text(odd.read_text().replace(str(GONE), str(loop)))
    ended = record(node, "ended", 0)
    collect(node, "pods", [], tally)
    assert (odd.exists(), ended.exists()) == (True, False)
    assert (tally.removed, tally.failed) == (1, 1)


def test_a_pod_whose_cgroup_is_gone_has_lost_no_program(tmp_path: Path) -> None:
    folder = tmp_path / "cgroup"
    folder.mkdir()
    there = BLANK._replace(cgroup=str(folder), inode=folder.stat().st_ino)
    assert has_cgroup(there)
    assert not has_cgroup(there._replace(inode=there.inode + 1))  # another pod has its path
    node = Node(tmp_path / "bpffs", tmp_path / "state")
    record(node, "gone", 0)
    facts = report.facts(node)
    assert facts.gone == frozenset({BLANK.pod_id})
    assert facts.lost == frozenset()
    assert 'tcpip_bypass_pods{state="lost"} 0.0' in Metrics(node).render().decode()
    (document,) = report.as_json(facts)["pods"]
    assert (document["attached"], document["gone"]) == (False, True)
    (labels,) = [tables._labels(each, facts) for each in facts.attachments]
    assert "its cgroup is gone" in [text.plain for text in labels]
    (pod,) = pods.recorded(facts)
    assert (pod.state, "its cgroup is gone" in pod.why) == (pods.GONE, True)
    assert of_node._summary([pod], "").status == exits.WELL
    whole = replace(WELL, attachments=facts.attachments, attached=frozenset(), gone=facts.gone)
    assert whole.exit_status == exits.WELL
    assert replace(whole, gone=frozenset()).exit_status == exits.LESS
    labels = tables._labels(facts.attachments[0], replace(facts, gone=frozenset()))
    assert "lost its programs" in [text.plain for text in labels]
