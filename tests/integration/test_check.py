# SPDX-License-Identifier: Apache-2.0
"""`check`, the reporting commands' exit statuses, and `load` on a node without a bpffs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from install.program import VERSION, exits
from tests.bed import open_bed
from tests.bed.bed import FROZEN_PLUGIN, Bed
from tests.bed.node import PROGRAM
from tests.integration import plugin_calls

CONFLIST = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}]}


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with open_bed() as made:
        yield made


class Installed:
    """A bed's node with CNI folders of its own, and the program called on it."""

    def __init__(self, bed: Bed, folder: Path) -> None:
        self.node, self.conf_dir, self.bin_dir = bed.node, folder / "net.d", folder / "bin"
        self.conf_dir.mkdir()
        (self.conf_dir / "10-pods.conflist").write_text(json.dumps(CONFLIST))
        self.bin_dir.mkdir()
        (self.bin_dir / "bridge").touch()

    def call(self, command: str, *options: str) -> tuple[int, str]:
        """Exit status and what was printed."""
        argv: list[str | Path] = [PROGRAM, command, *options]
        argv += ["--bpffs", self.node.bpffs, "--state-dir", self.node.state_dir]
        argv += ["--cni-conf-dir", self.conf_dir]
        if command != "status":
            argv += ["--cni-bin-dir", self.bin_dir, "--plugin-dir", FROZEN_PLUGIN]
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout

    def allowed(self) -> str:
        """The mode that the self-test allows."""
        return str(json.loads(self.call("status", "--json")[1])["mode"])

    def check(self, *options: str) -> tuple[int, dict[str, Any]]:
        """`check --json`: exit status, and findings by name."""
        status, printed = self.call("check", "--json", *options)
        document = json.loads(printed)
        assert document["status"] == exits.WORDS[status]
        assert document["version"] == VERSION
        return status, {each["name"]: each for each in document["findings"]}


def forced(allowed: str) -> int:
    """The exit status where `full` is forced on a kernel that allows this."""
    return exits.WELL if allowed == "full" else exits.LESS


@pytest.fixture
def node(bed: Bed, tmp_path: Path) -> Installed:
    return Installed(bed, tmp_path)


def test_before_and_after_the_installation(node: Installed) -> None:
    status, findings = node.check("--before-install")
    assert status in (exits.WELL, exits.LESS), findings
    assert {"kernel", "btf", "cgroup2", "conflist", "plugin runs", "mode"} <= findings.keys()
    assert findings.keys().isdisjoint({"entry", "programs"})
    assert [path.name for path in node.bin_dir.iterdir()] == ["bridge"]
    status, findings = node.check()
    assert status == exits.NOT
    assert {
        name for name, each in findings.items() if each["status"] == exits.WORDS[exits.NOT]
    } == {
        "plugin",
        "entry",
    }
    assert node.call("install", "--conf-json", '{"mode": "full"}')[0] == 0
    status, findings = node.check()
    assert status in (exits.WELL, exits.LESS), findings  # the runtime's socket is not there
    assert findings["mode"]["found"].startswith("full, forced")
    assert findings["mode"]["status"] == exits.WORDS[forced(node.allowed())]
    for name in ("plugin", "plugin runs", "entry", "programs", "joiner"):
        assert findings[name]["status"] == exits.WORDS[exits.WELL], findings[name]
    printed = node.call("check")[1]
    assert "✔ entry" in printed


def test_the_mode_that_the_configuration_forces_is_in_force(node: Installed) -> None:
    node.call("install", "--conf-json", '{"mode": "full"}')
    status, printed = node.call("status", "--json")
    document = json.loads(printed)
    assert (document["forced_mode"], document["mode_in_force"]) == ("full", "full")
    assert document["version"] == VERSION
    assert document["kernel"]
    assert document["node"]
    assert status == forced(document["mode"])
    assert "mode full, which the configuration forces" in node.call("status")[1]
    node.call("install", "--conf-json", '{"mode": "off"}')
    assert node.call("status", "--json")[0] == exits.NOT


def test_what_is_wrong_with_pods_is_named(bed: Bed, node: Installed) -> None:
    node.call("install", "--conf-json", '{"mode": "full"}')
    with plugin_calls.sandbox(bed, "paused") as pod:
        assert pod.call("ADD").exit == 0
        assert node.call("status")[0] == forced(node.allowed())
        bed.node.call("pause")
        assert node.call("status")[0] == exits.LESS
        status, printed = node.call("check", "--json")
        assert status == exits.LESS
        document = json.loads(printed)
        assert [each["state"] for each in document["pods"]] == ["paused"]
        assert "paused" in {each["name"] for each in document["findings"]}
        bed.node.call("resume")
        assert pod.call("DEL").exit == 0


def test_status_of_a_node_where_nothing_is_loaded(tmp_path: Path) -> None:
    places: list[str | Path] = ["--bpffs", tmp_path / "bpffs", "--state-dir", tmp_path / "state"]
    argv = [PROGRAM, "status", *places]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == exits.NOT
    assert done.stdout.startswith("Not loaded")


def test_load_mounts_a_bpffs_where_there_is_none(tmp_path: Path) -> None:
    """In a mount namespace of its own, so that nothing is left."""
    folder = tmp_path / "bpf"
    folder.mkdir()
    places = f"--bpffs {folder}/tcpip-bypass --state-dir {tmp_path}/state"
    script = f"{PROGRAM} load {places} && stat -f -c %T {folder} && {PROGRAM} unload {places}"
    unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script]
    done = subprocess.run(unshare, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert "mounted a bpffs" in done.stderr
    assert "bpf_fs" in done.stdout
    (folder / "data").write_text("somebody's")
    done = subprocess.run(
        [PROGRAM, "load", *places.split()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"mount -t bpf bpf {folder}" in done.stderr
    assert (folder / "data").exists()


def test_unload_leaves_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    """A mistyped one, with a layout like that of our pins: what is on no bpffs is not ours."""
    (tmp_path / "gen-1").mkdir()
    (tmp_path / "current").symlink_to("gen-1")
    before = sorted(tmp_path.rglob("*"))
    argv: list[str | Path] = [PROGRAM, "unload", "--bpffs", tmp_path]
    argv += ["--state-dir", tmp_path / "state"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.rglob("*")) == before
