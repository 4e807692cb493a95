# SPDX-License-Identifier: Apache-2.0
"""The plugin on nodes of any kind. Where it cannot run, or no longer, pods start all the same.

Each node has a mount namespace and a root of its own, which the node program is not in: it is
started here, where everything runs, as in a pod. What a runtime would do is done on the node.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from cni_plugin import names
from install.program import exits
from tests.bed import open_bed, roots
from tests.bed.bed import FROZEN_PLUGIN
from tests.bed.node import PROGRAM
from tests.unit import frozen

LOADER = "ld-glibc.so.2"
CONFLIST = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}]}
PATIENCE_S = 600  # a busy machine compiles the programs for minutes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Of a node with busybox, a network, and nothing else."""
    made = tmp_path / "root"
    roots.make(made)
    (made / "etc/cni/net.d/10-pods.conflist").write_text(json.dumps(CONFLIST))
    (made / "opt/cni/bin/bridge").touch()
    return made


def program(
    node: roots.Node, command: str, *options: str | Path
) -> subprocess.CompletedProcess[str]:
    """The node program, which is not on the node; folders as a pod's volumes show them."""
    return subprocess.run(
        [PROGRAM, command, *places(node), *options], capture_output=True, text=True, check=False
    )


def places(node: roots.Node, bin_dir: Path | None = None) -> list[str | Path]:
    return [
        *("--cni-conf-dir", node.conf_dir, "--cni-bin-dir", bin_dir or node.bin_dir),
        *("--host-proc", node.proc, "--plugin-dir", FROZEN_PLUGIN),
        *("--state-dir", node.root.parent / "state", "--bpffs", node.root.parent / "bpffs"),
    ]


def status(node: roots.Node) -> str:
    state = ("--state-dir", node.root.parent / "state", "--bpffs", node.root.parent / "bpffs")
    argv: list[str | Path] = [PROGRAM, "status", *state]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={"COLUMNS": "400"})
    assert done.returncode in (exits.LESS, exits.NOT), done.stderr
    return " ".join(done.stdout.split())


def types(node: roots.Node) -> list[str]:
    conflist = json.loads((node.conf_dir / "10-pods.conflist").read_text())
    return [plugin["type"] for plugin in conflist["plugins"]]


def start_pod(node: roots.Node, command: str = "ADD") -> list[int]:
    """What the plugins of the network that can be called end with, as the node's runtime calls."""
    conf: dict[str, Any] = {"cniVersion": "1.0.0", "name": "pods", "type": names.PLUGIN}
    conf |= {"bpffs": "/nowhere", "stateDir": "/opt/state"}
    conf |= {"prevResult": {"cniVersion": "1.0.0", "interfaces": [], "ips": [], "dns": {}}}
    call = [
        *(f"CNI_COMMAND={command}", "CNI_CONTAINERID=c1", "CNI_NETNS=/no/such/netns"),
        *("CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin"),
    ]
    return [
        node.call(roots.BIN_DIR / each, stdin=json.dumps(conf), environment=call).returncode
        for each in types(node)
        if each != "bridge"
    ]


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(node: roots.Node, why: str) -> None:
    before = content(node.root)
    done = program(node, "install")
    assert done.returncode == 1
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert content(node.root) == before
    assert [path.name for path in node.bin_dir.iterdir()] == ["bridge"]
    assert types(node) == ["bridge"]
    assert start_pod(node) == []
    assert why in status(node)


@pytest.mark.parametrize("kind", roots.KINDS)
def test_the_plugin_runs_on_any_node(tmp_path: Path, kind: str) -> None:
    """The node has no C library, or another one."""
    with roots.running_kind(tmp_path / "root", kind) as node:
        (node.conf_dir / "10-pods.conflist").write_text(json.dumps(CONFLIST))
        (node.bin_dir / "bridge").touch()
        done = program(node, "install")
        assert done.returncode == 0, done.stderr
        assert types(node) == ["bridge", names.PLUGIN]
        assert [start_pod(node), start_pod(node, "DEL")] == [[0], [0]]
        (frozen_by_pyinstaller,) = node.bin_dir.glob(".tcpip-bypass/*/plugin")
        assert node.call(node.path(frozen_by_pyinstaller)).returncode != 0


def test_a_folder_that_is_noexec_on_the_node_alone(root: Path) -> None:
    with roots.running(root) as node:
        for options in ("bind", "remount,bind,noexec"):
            node.run("mount", "-o", options, roots.BIN_DIR, roots.BIN_DIR)
        assert_refused(node, "is on a file system that is mounted noexec")


@pytest.mark.parametrize("name", ["/plugin/tcpip-bypass", "/link"])
def test_a_root_without_proc(tmp_path: Path, name: str) -> None:
    """And without all else."""
    shutil.copytree(FROZEN_PLUGIN, tmp_path / "plugin")
    (tmp_path / "link").symlink_to("plugin/tcpip-bypass")
    done = subprocess.run(
        ["/usr/sbin/chroot", tmp_path, name],
        env={"CNI_COMMAND": "VERSION"},
        input="{}",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "supportedVersions" in json.loads(done.stdout), done


def test_the_plugin_gets_no_variable_but_cnis() -> None:
    """A library to preload, or a locale, is made for another C library."""
    odd = {"LD_PRELOAD": "/bin/true", "LC_ALL": "C.UTF-8", "_PYI_ARCHIVE_FILE": "/bin/true"}
    with subprocess.Popen(
        [FROZEN_PLUGIN / names.PLUGIN],
        env={**odd, "CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as running:
        deadline = time.monotonic() + PATIENCE_S
        while not (child := Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        environ, comm = (Path("/proc", child.strip(), name) for name in ("environ", "comm"))
        while comm.read_text() != "tcpip-bypass\n" or b"_PYI_ARCHIVE" not in environ.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found = dict(each.split("=", 1) for each in environ.read_text().rstrip("\0").split("\0"))
    assert found.keys() - {"CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME"} == {
        *("_PYI_ARCHIVE_FILE", "_PYI_PARENT_PROCESS_LEVEL", "_PYI_LINUX_PROCESS_NAME")
    }
    assert found["_PYI_ARCHIVE_FILE"] == str(FROZEN_PLUGIN / "plugin")


def test_a_new_plugin_that_does_not_run_leaves_the_old_one(root: Path, tmp_path: Path) -> None:
    with roots.running(root) as node:
        old = frozen.made(tmp_path / "old")
        assert program(node, "install", "--plugin-dir", old).returncode == 0
        before = content(node.root)
        new = shutil.copytree(FROZEN_PLUGIN, tmp_path / "new")
        (new / LOADER).unlink()
        done = program(node, "install", "--plugin-dir", new)
        assert f"{LOADER} in its folder cannot be executed" in done.stderr
        assert content(node.root) == before
        assert types(node) == ["bridge", names.PLUGIN]


def test_a_fit_node_whose_folders_have_other_names_in_the_pod(root: Path, tmp_path: Path) -> None:
    """As on GKE and K3s; and seen through a second mount of the disk that is noexec."""
    with roots.running(root) as node:
        (root / "disk").mkdir()
        node.run("mount", "-o", "bind", "/opt", "/disk")
        node.run("mount", "-o", "remount,bind,noexec", "/disk", "/disk")
        done = install_in_pod(node, tmp_path / "in the pod", "--bind", node.bin_dir)
        assert done.returncode == 0, done.stderr
        assert types(node) == ["bridge", names.PLUGIN]
        assert start_pod(node) == [0]
        assert "cannot run" not in status(node)


def test_a_folder_that_the_node_does_not_see(root: Path, tmp_path: Path) -> None:
    """What a pod has without a volume there."""
    with roots.running(root) as node:
        done = install_in_pod(node, tmp_path / "in the pod", "-t", "tmpfs", "none")
        assert done.returncode == 1
        assert "could not be tried" in done.stderr
        assert "nowhere in the node's mount namespace" in done.stderr
        assert types(node) == ["bridge"]


def install_in_pod(
    node: roots.Node, bin_dir: Path, *mount: str | Path
) -> subprocess.CompletedProcess[str]:
    """With something mounted on the plugins' folder, which the node knows nothing of."""
    bin_dir.mkdir()
    script = 'folder=$1; shift; mount "$@" "$folder"; touch "$folder/bridge"'
    argv: list[str | Path] = ["unshare", "--mount", "sh", "-ec", f'{script}; eval "exec $INSTALL"']
    command = shlex.join(map(str, [PROGRAM, "install", *places(node, bin_dir)]))
    return subprocess.run(
        [*argv, "sh", bin_dir, *mount],
        env={**os.environ, "INSTALL": command},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_stub_needs_nothing_of_the_node(root: Path) -> None:
    """Not even a shell, which Talos and Bottlerocket do without."""
    with roots.running(root) as node:
        assert program(node, "install").returncode == 0
        (root / "bin/sh").unlink()
        done = program(node, "uninstall")
        assert (done.returncode, "stub" in done.stdout) == (0, True), done.stderr
        assert types(node) == ["bridge"]
        assert end_pod(node) == 0


@dataclass
class Agent:
    """The agent of a node, in a bed's folders."""

    node: roots.Node
    folders: list[str | Path]
    log: Path
    port: int

    @contextmanager
    def running(self) -> Iterator[None]:
        options = ["--listen", f"127.0.0.1:{self.port}", "--log-format", "json"]
        argv = [PROGRAM, "agent", *places(self.node), *self.folders, *options]
        argv += ["--cri-socket", self.node.root / "no-runtime.sock"]
        with self.log.open("ab") as log, subprocess.Popen(argv, stderr=log) as process:
            try:
                yield
            finally:
                process.terminate()

    def events(self) -> list[str]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line)["event"] for line in lines if line.startswith("{")]

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; 0 while nothing is served."""
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def status(self) -> Any:
        argv = [PROGRAM, "status", "--json", *self.folders]
        done = subprocess.run(argv, capture_output=True, check=False)
        assert done.returncode == exits.LESS, done.stderr  # its plugin, its mode
        return json.loads(done.stdout)

    def wait_until(self, what: str, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline, f"not {what}: {self.log.read_text()}"
            time.sleep(0.1)

    def runs(self) -> bool:
        """What the metrics say of the plugin."""
        return "\ntcpip_bypass_plugin_runs 1.0\n" in self.get("/metrics")[1]


@pytest.fixture
def agent(root: Path, tmp_path: Path) -> Iterator[Agent]:
    with open_bed(bypass=False) as bed, roots.running(root) as node:
        with socket.create_server(("127.0.0.1", 0)) as found:
            port = int(found.getsockname()[1])
        folders: list[str | Path] = ["--bpffs", bed.node.bpffs, "--state-dir", bed.node.state_dir]
        try:
            yield Agent(node, folders, tmp_path / "log", port)
        finally:
            bed.node.call("unload")


def break_plugin(node: roots.Node) -> Path:
    """On the node alone, since the pod sees a whole one; returns what to unmount to mend it."""
    (loader,) = node.bin_dir.glob(f".tcpip-bypass/*/{LOADER}")
    node.run("mount", "-o", "bind", "/proc/version", node.path(loader))
    return node.path(loader)


def entry(node: roots.Node) -> Any:
    return json.loads((node.conf_dir / "10-pods.conflist").read_text())["plugins"][1]


def end_pod(node: roots.Node) -> int:
    """What is called for a pod from before by a runtime that cached its configuration."""
    call = ("CNI_COMMAND=DEL", "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_PATH=/opt/cni/bin")
    return node.call(roots.BIN_DIR / names.PLUGIN, stdin="{}", environment=call).returncode


def test_an_installed_plugin_that_runs_no_longer(agent: Agent) -> None:
    node, conflist = agent.node, agent.node.conf_dir / "10-pods.conflist"
    with agent.running():
        agent.wait_until("ready", lambda: agent.get("/readyz")[0] == 200)
        assert start_pod(node) == [0]
        options = {"excludeNamespaces": ["shop"]}
        whole = json.loads(conflist.read_text())
        whole["plugins"][1] |= options
        by_hand = json.dumps(whole)
        conflist.write_text(by_hand)

        broken = break_plugin(node)
        assert start_pod(node) == [0], "without us"
        conflist.write_text(by_hand)  # wakes the agent, which would look within two minutes
        agent.wait_until("without us", lambda: types(node) == ["bridge"])
        assert start_pod(node) == []
        agent.wait_until("told", lambda: not agent.runs())
        assert end_pod(node) == 0
        assert agent.events().count("entry_withdrawn") == 1
        assert f"{LOADER} in its folder" in agent.status()["plugin_problem"]
        code, said = agent.get("/readyz")
        assert (code, f"{LOADER} in its folder" in said) == (503, True)

        node.run("umount", broken)
        agent.wait_until("with us again", lambda: types(node) == ["bridge", names.PLUGIN])
        assert start_pod(node) == [0]
        assert entry(node)["excludeNamespaces"] == options["excludeNamespaces"]
        assert sorted(path.name for path in node.conf_dir.iterdir()) == [conflist.name]
        agent.wait_until("ready again", lambda: agent.get("/readyz")[0] == 200)
        assert agent.runs()
        assert agent.status()["plugin_problem"] is None


def test_a_node_that_boots_with_a_broken_plugin(agent: Agent) -> None:
    """Before anything is loaded, which takes its time, no pod must fail."""
    node = agent.node
    assert program(node, "install", *agent.folders).returncode == 0
    break_plugin(node)
    with agent.running():
        agent.wait_until("loading", lambda: "loading" in agent.events())
        assert types(node) == ["bridge"]
        assert agent.events().index("entry_withdrawn") < agent.events().index("loading")
