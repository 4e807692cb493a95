# SPDX-License-Identifier: Apache-2.0
"""The agent on a node with a real containerd, from the first install to the last trace.

The tests share one node on which the agent runs. Each may leave that in any state but for pods:
putting it right is the agent's business, and the fixture's only help is to start the agent when a
test has ended it.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from bpf import bpfsys, pins
from bpf.loader import takes_in
from cni_plugin import attachment, names
from cni_plugin.state import Key, State
from install.program.agent import bpffs
from install.program.generations import is_bpffs, opened
from tests.bed import OPTED_OUT, apiserver, cgroups, cni
from tests.bed.cni import Json
from tests.bed.pod import MESH
from tests.containerd import containerd, traffic
from tests.containerd.agent import Agent, Release
from tests.containerd.bed import PLAIN, Pod, RuntimeBed, open_bare_bed, run
from tests.containerd.cri import Wishes
from tests.containerd.inventory import attached
from tests.containerd.traffic import Report, Traffic

OURS = [pins.SOCK_OPS_NAME]
REWRITES, REWRITE_EVERY_S = 50, 0.2
CHURN_AT_ONCE = 3
PATIENCE_S = 60
SERVICE_ACCOUNT = Path("/run/secrets/kubernetes.io/serviceaccount")
DAEMONSET = ("--daemonset", f"{apiserver.NAMESPACE}/{apiserver.NAME}")
SLEPT = re.compile(r"^voluntary_ctxt_switches:\s+(\d+)", re.MULTILINE)
NO_BCC = 'raise ImportError("libbcc.so.0: cannot open shared object file")\n'


@pytest.fixture(scope="module")
def started_agent() -> Iterator[Agent]:
    """An agent that was not started yet; in the end the node must not remember it."""
    with open_bare_bed() as bed:
        agent = Agent(bed)
        files = {path.name for path in agent.bin_dir.iterdir()}
        try:
            yield agent
        finally:
            agent.kill()
        agent.run("uninstall", "--purge", *agent.places())
        assert agent.conflist.read_text() == agent.original
        assert {path.name for path in agent.bin_dir.iterdir()} == files
        assert not agent.bpffs.exists()
        assert not bed.state_dir.exists()
        left = bed.leftovers()
        assert not any(left.values()), left


@pytest.fixture
def agent(started_agent: Agent) -> Iterator[Agent]:
    """The agent, running and content; at the end no pod may be left."""
    agent, bed = started_agent, started_agent.bed
    if agent.environment or not agent.is_running:
        agent.kill()
        agent.release, agent.environment, agent.options = Release(), {}, ()
        agent.start_and_wait()
    yield agent
    left = bed.added()
    assert left["attachment records"] == left["attached programs"] == [], left


@contextmanager
def made(
    bed: RuntimeBed, *named: str, annotations: Mapping[str, str] = MESH
) -> Iterator[list[Pod]]:
    """Pods, without sandboxes yet; those are ended before the pods go."""
    with ExitStack() as stack:
        pods = [
            stack.enter_context(bed.pod(name, annotations=annotations, handler=PLAIN))
            for name in named
        ]
        try:
            yield pods
        finally:
            uids = [pod.identity.uid for pod in pods]
            for each in bed.cri.sandboxes():
                if each.pod_uid in uids:
                    pods[uids.index(each.pod_uid)].end_sandbox(each.id)


def accelerated(pods: list[Pod]) -> list[bool]:
    return [attached(pod.cgroup) == OURS for pod in pods]


@contextmanager
def talking(pods: list[Pod], sandboxes: list[str]) -> Iterator[Traffic]:
    """Traffic from the first of these pods to the second."""
    (client, server), (client_box, server_box) = pods, sandboxes
    program: list[str | Path] = [sys.executable, "-I", traffic.__file__]
    serving = server.entering(server_box, [*program, "serve"])
    asking = client.entering(client_box, [*program, "ask", server.address(server_box)])
    with traffic.started(serving), traffic.started(asking) as process:
        yield Traffic(process)


def assert_whole(report: Report) -> None:
    assert report.errors == []
    assert report.brief > 0
    assert min(report.lasting) > 0


def bytes_of(agent: Agent, pod: Pod) -> tuple[int, int]:
    """What a pod has exchanged with its like: bypassed, by TCP."""
    pods = json.loads(agent.run("status", "--json"))["pods"]
    hops = next(each["hops"] for each in pods if each["name"] == pod.identity.name)
    direct = hops.get("direct", {"bypassed_bytes": 0, "tcp_bytes": 0})
    return direct["bypassed_bytes"], direct["tcp_bytes"]


def members(agent: Agent) -> int:
    """How many sockets are in the sockhash."""
    with opened(agent.bpffs / pins.CURRENT / pins.SOCKHASH) as sockhash:
        return len(list(bpfsys.map_keys(sockhash, 8)))


def plugins_in(conflist: Path) -> list[str]:
    return [plugin["type"] for plugin in json.loads(conflist.read_text())["plugins"]]


def test_install_into_a_node_with_pods(started_agent: Agent) -> None:
    agent, bed = started_agent, started_agent.bed
    with ExitStack() as stack:
        mesh = stack.enter_context(made(bed, "client", "server"))
        others = [
            *stack.enter_context(made(bed, "opted-out", annotations={**MESH, **OPTED_OUT})),
            *stack.enter_context(made(bed, "not-in-the-mesh", annotations={})),
            stack.enter_context(bed.pod("host", wishes=Wishes(host_network=True), handler=PLAIN)),
        ]
        boxes = run([*mesh, *others])
        with talking(mesh, boxes[:2]) as load:
            agent.start_and_wait()
            assert accelerated([*mesh, *others]) == [True, True, False, False, False]
            before, _ = bytes_of(agent, mesh[0])
            agent.wait_until("bypassing", lambda: bytes_of(agent, mesh[0])[0] > before)
            if takes_in(platform.release()):  # the lasting connections are older than the agent
                agent.wait_until("taken in", lambda: members(agent) >= 2 * traffic.LASTING)
            assert_whole(load.end())
        assert plugins_in(agent.conflist) == ["bridge", "tcpip-bypass"]
        assert {(each["pod"], each["container"]) for each in agent.said("pod_repaired")} == {
            (f"default/{pod.identity.name}", box) for pod, box in zip(mesh, boxes)
        }
        assert_like_an_add_by_the_runtime(agent, mesh[0], boxes[0])
        bed.end_all_sandboxes()
        assert accelerated(mesh) == [False, False]
        assert bed.added()["attachment records"] == []


def assert_like_an_add_by_the_runtime(agent: Agent, adopted: Pod, box: str) -> None:
    """All that is recorded of an adopted pod has its like in a pod that containerd ADDed."""
    with made(agent.bed, "new") as [pod]:
        new = pod.run_sandbox()
        state = State(str(agent.bed.state_dir))
        ours, theirs = (state.read(Key(each, "eth0")) for each in (box, new))
        assert ours is not None
        assert theirs is not None
        assert ours.ips == [[adopted.address(box), "eth0"]]
        assert (ours.cgroup, ours.pod_uid) == (str(adopted.cgroup), adopted.identity.uid)
        for key in ("network", "pod_namespace", "prog_id", "generation", "flags"):
            assert getattr(ours, key) == getattr(theirs, key)
        assert Path(ours.netns).parent == Path(theirs.netns).parent


def test_reports_know_the_runtimes_pods(agent: Agent) -> None:
    bed, places = agent.bed, agent.places()
    with ExitStack() as stack:
        mesh = stack.enter_context(made(bed, "client", "server"))
        out = stack.enter_context(made(bed, "opted-out", annotations={**MESH, **OPTED_OUT}))
        boxes = run([*mesh, *out])
        with talking(mesh, boxes[:2]) as load:
            checked = json.loads(agent.run("check", "--json", *places))
            options = ("--json", "--seconds", "2", *places)
            estimated = json.loads(agent.run("estimate", *options))
            assert_whole(load.end())
    findings = {each["name"]: each for each in checked["findings"]}
    for name in ("runtime", "conflist", "plugin", "entry", "programs", "pods"):
        assert findings[name]["status"] == "well", findings[name]
    states = {each["name"]: (each["state"], each["why"]) for each in checked["pods"]}
    assert {name: state for name, (state, _) in states.items()} == {
        "client": "accelerated",
        "server": "accelerated",
        "opted-out": "left out",
    }
    assert "tcpip-bypass/enabled is false" in states["opted-out"][1]
    pods = {each["name"]: each for each in estimated["pods"]}
    assert pods.keys() == states.keys()
    assert [pods[name]["accelerated"] for name in ("client", "opted-out")] == [True, False]
    direct = pods["client"]["hops"]["direct"]
    assert sum(each["connection_ends"] for each in (direct["bypass"], *direct["tcp"].values()))
    log = bed.node.outside(Path(names.STATE_DIR)) / names.AGENT_LOGS[1]
    assert '"event": "loaded"' in log.read_text()


def test_churn(agent: Agent) -> None:
    began = len(agent.events())
    deadline = time.monotonic() + PATIENCE_S
    with churning(agent.bed) as lives:
        while len(lives) <= CHURN_AT_ONCE and time.monotonic() < deadline:
            time.sleep(0.5)
    assert len(lives) > CHURN_AT_ONCE
    assert all(lives)
    assert {each["event"] for each in agent.events()[began:]} <= {"sandboxes_checked"}


@contextmanager
def churning(bed: RuntimeBed) -> Iterator[list[bool]]:
    """Pods come and go all the time, each without an error; whether each was accelerated."""
    lives: list[bool] = []
    stop = threading.Event()

    def live(number: int) -> None:
        for count in itertools.count():
            with made(bed, f"churn-{number}-{count}") as [pod]:
                box = pod.run_sandbox()
                lives.extend(accelerated([pod]))
                pod.end_sandbox(box)
            if stop.is_set():
                return

    with ThreadPoolExecutor(CHURN_AT_ONCE) as pool:
        threads = [pool.submit(live, number) for number in range(CHURN_AT_ONCE)]
        try:
            yield lives
        finally:
            stop.set()
        for thread in threads:
            thread.result()


def test_a_new_file_takes_precedence(agent: Agent) -> None:
    first = agent.conf_dir / "05-other.conflist"
    chain = {"cniVersion": "1.0.0", "name": "other", "plugins": [cni.bridge(Path("/nowhere"))]}
    try:
        first.write_text(json.dumps(chain))
        agent.wait_until("in the new file", lambda: len(plugins_in(first)) == 2)
        assert plugins_in(first) == plugins_in(agent.conflist)
    finally:
        first.unlink()


def test_a_file_of_one_plugin_is_followed(agent: Agent) -> None:
    """It keeps its name, is rewritten in place, and goes; the list that we made of it goes then."""
    single = agent.conf_dir / "05-other.conf"
    ours = agent.conf_dir / "05-other-tcpip-bypass.conflist"
    conf = {"cniVersion": "1.0.0", "name": "other", **cni.bridge(Path("/nowhere"))}
    try:
        for text in (json.dumps({**conf, "mtu": mtu}) for mtu in (1500, 1400)):
            single.write_text(text)
            agent.wait_until("followed", partial(is_made_of, ours, json.loads(text)))
            assert plugins_in(ours) == ["bridge", "tcpip-bypass"]
            assert single.read_text() == text
    finally:
        single.unlink()
    agent.wait_until("gone", lambda: not ours.exists())


def is_made_of(conflist: Path, plugin: Json) -> bool:
    """Whether that plugin is the first in the list, if the list is there."""
    return conflist.exists() and json.loads(conflist.read_text())["plugins"][0] == plugin


def test_an_idle_agent_is_small_and_asleep(agent: Agent) -> None:
    memory = Path(f"/proc/{agent.pid}/smaps_rollup").read_text()
    assert int(memory.partition("\nRss:")[2].split()[0]) < 60 * 1024
    # It looks after pods that were starting when it came, and looks around once a minute.
    assert any(wake_ups(agent.pid, 2) == 0 for _ in range(5))


def wake_ups(pid: int, seconds: float) -> int:
    """How often any thread of a process has slept and was woken in that time."""

    def so_far() -> int:
        texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status")]
        return sum(int(SLEPT.findall(text)[0]) for text in texts)

    before = so_far()
    time.sleep(seconds)
    return so_far() - before


def test_another_writer_of_the_conflist(agent: Agent) -> None:
    bed, began = agent.bed, len(agent.events())
    with made(bed, "before", "meanwhile") as pods:
        run(pods[:1])
        for number in range(REWRITES):
            part = agent.conf_dir / "rewritten.tmp"
            part.write_text(agent.original)
            part.rename(agent.conflist)
            if number == REWRITES // 2:
                run(pods[1:])
            time.sleep(REWRITE_EVERY_S)
        agent.wait_until("back in", lambda: agent.entry() is not None)
        agent.wait_until("with all pods", lambda: accelerated(pods) == [True, True])
    assert plugins_in(agent.conflist) == ["bridge", "tcpip-bypass"]
    assert 1 <= len(agent.said("conflist_changed", began)) <= 8


def test_upgrade_and_downgrade_under_load(agent: Agent) -> None:
    bed = agent.bed
    following = Release.next(bed.node.folder / "next")
    with made(bed, "client", "server", "late") as pods:
        boxes = run(pods[:2])
        generation = agent.generations()[-1]
        installed = agent.program
        with talking(pods[:2], boxes) as load, churning(bed) as lives:
            for release in (following, Release()):
                assert agent.end() == 0
                assert accelerated(pods[:2]) == [True, True]
                agent.release = release
                agent.start_and_wait()
                assert accelerated(pods[:2]) == [True, True]
                assert agent.generations()[-1] != generation
                assert agent.program != installed
                generation, installed = agent.generations()[-1], agent.program
            assert_whole(load.end())
        assert all(lives)  # also between two agents
        late = pods[2].run_sandbox()
        record = State(str(bed.state_dir)).read(Key(late, "eth0"))
        assert record is not None
        assert record.generation == generation


def test_a_restart_changes_nothing(agent: Agent) -> None:
    with made(agent.bed, "client", "server") as pods:
        boxes = run(pods)
        before = agent.generations(), agent.program, agent.conflist.stat().st_ino
        began = len(agent.events())
        with talking(pods, boxes) as load:
            agent.end(signal.SIGKILL)
            assert accelerated(pods) == [True, True]
            agent.start_and_wait()
            assert_whole(load.end())
        assert (agent.generations(), agent.program, agent.conflist.stat().st_ino) == before
        assert agent.said("loading", began) == agent.said("pod_repaired", began) == []


def test_ended_while_loading(agent: Agent) -> None:
    agent.end()
    agent.run("unload")
    with made(agent.bed, "patient") as pods:
        run(pods)
        (agent.bin_dir / names.PLUGIN).unlink()
        for delay_s, end in ((0.0, signal.SIGKILL), (0.5, signal.SIGTERM), (1.0, signal.SIGKILL)):
            seen = len(agent.events())
            agent.start()
            agent.wait_for("loading", since=seen)
            assert runs(agent)  # before a load, which takes its time
            time.sleep(delay_s)
            assert agent.end(end) == (0 if end == signal.SIGTERM else -end)
        agent.start_and_wait()
        assert accelerated(pods) == [True]


def test_without_a_runtimes_socket_the_rest_works(agent: Agent) -> None:
    agent.end()
    socket = agent.bed.node.outside(Path("/run/cri/containerd.sock"))
    agent.options = ("--cri-socket", "unix:///run/cri/containerd.sock")
    with made(agent.bed, "before", "after") as pods:
        agent.run("unload")
        run(pods[:1])
        seen = len(agent.events())
        agent.start()
        agent.wait_for("sandboxes_waiting", since=seen)
        agent.wait_until("ready", lambda: agent.reasons() == [])
        run(pods[1:])
        assert accelerated(pods) == [False, True]
        socket.parent.mkdir()
        os.link(agent.bed.node.outside(containerd.SOCKET), socket)
        agent.wait_until("with all pods", lambda: accelerated(pods) == [True, True])
    shutil.rmtree(socket.parent)
    agent.end()
    agent.options = ()


def test_a_disk_that_cannot_be_written(agent: Agent) -> None:
    folders = (agent.bin_dir, agent.conf_dir)
    agent.end()
    for folder in folders:
        agent.bed.node.run(["mount", "--bind", folder, folder])
        agent.bed.node.run(["mount", "-o", "remount,bind,ro", folder])
    try:
        agent.start_and_wait()  # what is there is enough
        agent.conflist.write_text(agent.original)
        agent.wait_until("aware of it", lambda: "cannot be written" in "".join(agent.reasons()))
    finally:
        for folder in folders:
            agent.bed.node.run(["umount", folder])
    agent.wait_until("ready", lambda: agent.reasons() == [])


def test_a_removal_from_a_disk_that_cannot_be_written(agent: Agent, tmp_path: Path) -> None:
    node, folder = agent.bed.node, agent.conf_dir
    agent.end()
    with api_server(agent, tmp_path) as server, made(agent.bed, "before", "after") as pods:
        agent.start_and_wait()
        run(pods[:1])
        assert accelerated(pods[:1]) == [True]
        server.answer = apiserver.GONE
        node.run(["mount", "--bind", folder, folder])
        node.run(["mount", "-o", "remount,bind,ro", folder])
        try:
            assert agent.end() == 1
        finally:
            node.run(["umount", folder])
        assert agent.generations() == []
        assert agent.entry() is not None
        run(pods[1:])  # the plugin is there, and passes them on
        assert accelerated(pods) == [False, False]


def test_two_agents_at_once(agent: Agent, tmp_path: Path) -> None:
    second = Agent(agent.bed, port=agent.port + 1)
    try:
        second.start()
        second.wait_for("waiting")
        assert "another agent" in second.reasons()[0]
        assert second.get("/healthz")[0] == 200
        assert agent.reasons() == []
        agent.kill()
        second.wait_until("ready", lambda: second.reasons() == [])
        agent.start()
        agent.wait_for("waiting", since=len(agent.events()) - 1)
    finally:
        second.kill()
    agent.wait_until("ready again", lambda: agent.reasons() == [])
    with api_server(second, tmp_path) as server:
        server.answer = apiserver.GONE
        seen = len(second.events())
        second.start()
        second.wait_for("waiting", since=seen)
        assert second.end() == 0
    assert "another agent" in second.said("stopped", seen)[0]["msg"]
    assert agent.entry() is not None
    assert agent.reasons() == []


@contextmanager
def api_server(agent: Agent, folder: Path) -> Iterator[apiserver.ApiServer]:
    """One on the node, which the agent asks from its next start on."""
    node = agent.bed.node
    with ExitStack() as stack:
        with node.host.entered():
            server = stack.enter_context(apiserver.running(folder))
        server.write_service_account(node.outside(SERVICE_ACCOUNT))
        stack.callback(shutil.rmtree, node.outside(SERVICE_ACCOUNT.parents[1]))
        agent.environment, agent.options = server.environment, DAEMONSET
        yield server


def test_a_port_that_is_taken_is_waited_for(agent: Agent) -> None:
    """Whoever deletes the pod by force has two agents at once, on one port."""
    second = Agent(agent.bed, port=agent.port)
    seen = len(second.events())  # one port, one log
    try:
        second.start()
        second.wait_for("port_taken", since=seen)
        agent.kill()
        second.wait_until("ready", lambda: second.reasons() == [])
        assert len(second.said("port_taken", since=seen)) == 1
        assert second.get("/startupz")[0] == 200
    finally:
        second.kill()
    agent.start_and_wait()


def test_a_port_of_another_program_keeps_no_agent_from_its_work(agent: Agent) -> None:
    """No probe reaches it, so it is killed now and then; until then it repairs."""
    agent.end()
    seen = len(agent.events())
    with agent.bed.node.host.entered():
        stranger = socket.create_server(("127.0.0.1", agent.port))
    with stranger:
        (agent.bin_dir / names.PLUGIN).unlink()
        agent.start()
        agent.wait_for("port_taken", since=seen)
        agent.wait_for("sandboxes_checked", since=seen)
        assert (agent.bin_dir / names.PLUGIN).is_file()
    agent.wait_until("ready", lambda: agent.reasons() == [])


def test_a_taken_port_does_not_keep_the_agent_from_ending(agent: Agent) -> None:
    second = Agent(agent.bed, port=agent.port)
    seen = len(second.events())
    second.start()
    second.wait_for("port_taken", since=seen)
    assert second.end() == 0


def test_the_clusters_switch(agent: Agent) -> None:
    """A ConfigMap's files are written; what runs is paused, what starts is left on TCP."""
    folder = agent.bed.node.folder / "switch"
    folder.mkdir()
    agent.end()
    agent.options = ("--switch-dir", str(folder))
    agent.start_and_wait()

    def say(**texts: str) -> None:
        seen = len(agent.events())
        for path in folder.iterdir():
            path.unlink()
        for key, text in texts.items():
            (folder / key).write_text(text)
        agent.wait_until("told", lambda: bool(agent.said("switch", seen)))

    def status() -> Json:
        found: Json = json.loads(agent.run("status", "--json"))
        return found

    with made(agent.bed, "before", "after") as pods:
        run(pods[:1])
        say(paused="true")
        assert status()["paused"]
        agent.run("resume")
        assert status()["paused"]
        agent.end()
        agent.run("unload")  # as a boot does
        agent.start_and_wait()
        assert status()["paused"]
        say()
        assert not status()["paused"]
        agent.wait_until("with its pod", lambda: accelerated(pods[:1]) == [True])

        say(excludeNamespaces="default", excludePorts="3306")
        run(pods[1:])
        assert accelerated(pods) == [True, False]
        assert [pod["paused"] for pod in status()["pods"]] == [True]

        seen = len(agent.events())
        (folder / "mode").write_text("fast")
        agent.wait_for("switch_failed", since=seen)
        assert [pod["paused"] for pod in status()["pods"]] == [True]
        assert "tcpip_bypass_switch_valid 0.0" in agent.get("/metrics")[1]
        assert agent.reasons() == []
        (folder / "mode").unlink()
        agent.wait_for("switch_recovered", since=seen)

        say(excludePorts="3306")
        agent.wait_until("with all pods", lambda: accelerated(pods) == [True, True])
        agent.wait_until(
            "with the port",
            lambda: {str(pod["excluded_ports"]) for pod in status()["pods"]} == {"[[3306, 3306]]"},
        )
        assert [pod["paused"] for pod in status()["pods"]] == [False, False]
    agent.end()
    shutil.rmtree(folder)


def test_what_is_damaged_is_mended(agent: Agent) -> None:
    with agent.program.open("r+b") as file:
        file.write(b"no program")
    agent.wait_until("with a whole program", lambda: runs(agent))
    (agent.bin_dir / names.PLUGIN).unlink()
    agent.wait_until("with a program", lambda: runs(agent))
    with made(agent.bed, "first", "second") as pods:
        run(pods)
        agent.bed.node.run(["umount", "--lazy", "/sys/fs/bpf"])
        agent.wait_for("bpffs_mounted")
        agent.wait_until("loaded again", lambda: len(agent.generations()) == 2)
        agent.wait_until("with all pods", lambda: all_current(agent, pods))


def test_bpffs_is_mounted_in_the_nodes_namespace(agent: Agent, tmp_path: Path) -> None:
    node = agent.bed.node
    namespace = tmp_path / "1" / "ns" / "mnt"  # as in a pod that has the node's /proc there
    namespace.parent.mkdir(parents=True)
    namespace.symlink_to(f"/proc/{node.holder}/ns/mnt")
    agent.end()
    node.run(["umount", "--lazy", "/sys/fs/bpf"])
    assert not is_bpffs(agent.bpffs)
    assert bpffs.mount(agent.bpffs, tmp_path)
    assert is_bpffs(agent.bpffs)
    assert not bpffs.mount(agent.bpffs, tmp_path)


def runs(agent: Agent) -> bool:
    """Whether the installed plugin answers."""
    argv: list[str | Path] = ["env", "CNI_COMMAND=VERSION", agent.bin_dir / names.PLUGIN]
    try:
        return "supportedVersions" in agent.bed.node.run(argv, stdin="{}")
    except RuntimeError:
        return False


def all_current(agent: Agent, pods: list[Pod]) -> bool:
    """Whether the pods' records, and not only their cgroups, are of the current generation."""
    status = json.loads(agent.run("status", "--json"))
    return {(each["name"], each["attached"]) for each in status["pods"]} == {
        (pod.identity.name, True) for pod in pods
    } and accelerated(pods) == [True] * len(pods)


def test_without_bcc_pods_start_all_the_same(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "bcc.py").write_text(NO_BCC)
    agent.end()
    agent.run("unload")
    agent.environment = {"PYTHONPATH": str(tmp_path)}
    agent.start()
    agent.wait_until("aware of it", lambda: "libbcc" in agent.reasons()[0])
    with made(agent.bed, "patient") as pods:
        run(pods)
        assert accelerated(pods) == [False]
        (tmp_path / "bcc.py").unlink()  # the agent tries again by itself
        agent.wait_until("with all pods", lambda: accelerated(pods) == [True])
    agent.wait_until("ready", lambda: agent.reasons() == [])


def test_a_node_without_a_network_yet(agent: Agent) -> None:
    with pytest.raises(RuntimeError, match="an agent runs on this node"):
        agent.run("unload")
    agent.end()
    usual, agent.conf_dir = agent.conf_dir, agent.bed.node.folder / "etc" / "cni" / "net.d"
    try:
        with pytest.raises(RuntimeError, match="no network configuration"):
            agent.run("agent", "--once", *agent.places())
        agent.start()
        agent.wait_until("waiting", lambda: "no network configuration" in agent.reasons()[0])
        agent.conf_dir.mkdir(parents=True)
        shutil.copy(usual / agent.conflist.name, agent.conflist)
        agent.wait_until("ready", lambda: agent.reasons() == [])
        agent.end()
        agent.run("agent", "--once", *agent.places())
    finally:
        agent.kill()
        agent.conf_dir = usual


def test_reboot(agent: Agent) -> None:
    bed = agent.bed
    with made(bed, "first", "second") as pods:
        run(pods)
        reboot(agent, pods)
        bed.end_all_sandboxes()  # as kubelet does with those of before
        boxes = run(pods, attempt=1)
        assert accelerated(pods) == [False, False]
        with talking(pods, boxes) as load:
            agent.start_and_wait()
            assert accelerated(pods) == [True, True]
            assert_whole(load.end())


def reboot(agent: Agent, pods: list[Pod]) -> None:
    """No process lives on, /run and bpffs are empty, cgroups are new; the disk is as it was."""
    bed = agent.bed
    agent.kill()
    bed.containerd.kill()
    for pid in bed.node.processes():
        if pid != bed.node.holder:
            with suppress(ProcessLookupError):  # the agent's joiner ends with it
                os.kill(pid, signal.SIGKILL)
    for pod in pods:
        cgroups.remove(pod.cgroup)
        pod.cgroup.mkdir()
    bed.node.run(["umount", "--lazy", "/sys/fs/bpf"])
    bed.node.run(["mount", "-t", "bpf", "node", "/sys/fs/bpf"])
    shutil.rmtree(bed.state_dir)
    bed.containerd.start()


def test_what_the_runtime_forgot_is_collected(agent: Agent) -> None:
    with made(agent.bed, "kept", "forgotten") as pods:
        kept, forgotten = run(pods)
        folder = agent.bed.state_dir / names.ATTACHMENTS
        record = folder / f"{forgotten}:eth0.json"
        orphan = folder / record.name.replace(forgotten, "f" * 64)
        owner = {"container_id": "f" * 64, "pod_id": attachment.pod_id("f" * 64, "eth0")}
        stale = json.loads(record.read_text()) | owner
        orphan.write_text(json.dumps(stale))
        agent.run("gc", *agent.places())
        assert orphan.exists()  # it may belong to a sandbox that is being made
        hour_ago = time.time() - 3600
        for path in (orphan, folder / f"{kept}:eth0.json"):
            os.utime(path, (hour_ago, hour_ago))
        agent.bed.containerd.kill()
        with pytest.raises(RuntimeError, match="nothing was changed"):
            agent.run("gc", *agent.places())
        agent.bed.containerd.start()
        agent.wait_until("without it", lambda: not orphan.exists())
        assert accelerated(pods) == [True, True]


def test_a_joiner_that_hangs_is_not_waited_for(agent: Agent) -> None:
    children = Path("/proc", str(agent.pid), "task", str(agent.pid), "children")
    commands = {
        int(pid): Path("/proc", pid, "cmdline").read_bytes() for pid in children.read_text().split()
    }
    (joiner,) = [pid for pid, command in commands.items() if b"\0join\0" in command]
    os.kill(joiner, signal.SIGSTOP)
    assert agent.end() == 0
    assert not Path("/proc", str(joiner)).exists()


def test_sigterm_means_leaving_only_when_the_daemonset_is_deleted(
    agent: Agent, tmp_path: Path
) -> None:
    bed = agent.bed
    agent.end()
    with ExitStack() as stack:
        server = stack.enter_context(api_server(agent, tmp_path))
        pods = stack.enter_context(made(bed, "client", "server"))
        boxes = run(pods)
        with talking(pods, boxes) as load:
            agent.start_and_wait()
            # A rolling update, and a token that was refused because its pod is gone.
            for answer in (apiserver.WANTED, apiserver.UNAUTHORIZED):
                server.answer = answer
                assert agent.end() == 0
                assert accelerated(pods) == [True, True]
                assert agent.entry() is not None
                server.answer = apiserver.WANTED
                agent.start_and_wait()
            agent.wait_until("bypassing", lambda: bytes_of(agent, pods[0])[0] > 0)
            server.answer = apiserver.GONE
            with churning(bed):
                assert agent.end() == 0
            assert accelerated(pods) == [False, False]
            assert agent.generations() == []
            assert plugins_in(agent.conflist) == ["bridge"]
            time.sleep(0.5)
            assert_whole(load.end())
        assert bed.added()["attachment records"] == []
        bed.end_all_sandboxes()  # by a containerd that knows nothing of us any more
