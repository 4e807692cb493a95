# SPDX-License-Identifier: Apache-2.0
"""Install and uninstall as a whole: the order of things, and every place where they can be killed.

The kernel's side is left out: what uninstall switches off is a list here.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from cni_plugin import names
from install.program import installer, trial
from install.program import node as program
from install.program.agent.agent import Agent, Settings
from install.program.agent.http import Health
from install.program.agent.metrics import Metrics
from install.program.cli import build_parser
from install.program.conf_dir import ConfDir, Outcome
from install.program.conflist import Entry
from install.program.installer import Places, Uninstalled
from install.program.plugin_files import DoesNotRun, InstallError
from tests.bed.node import PROGRAM
from tests.unit import frozen, networks, runtimes

PLAIN = Entry(None, {})
FLANNEL = networks.text("flannel.conflist").encode()
SINGLE = networks.text("single-conf.conf").encode()
OTHERS = ("flannel", "bridge")  # plugins of these two


@dataclass(frozen=True)
class Node:
    """A node's folders, and a file that stands for what is in the kernel."""

    folder: Path

    @property
    def places(self) -> Places:
        return Places(
            self.folder / "net.d", self.folder / "bin", self.folder / "source", Path("/proc")
        )

    @property
    def kernel(self) -> Path:
        return self.folder / "kernel"

    def programs(self) -> list[str]:
        """What is of ours in the plugins' folder."""
        found = [path.name for path in self.places.bin_dir.iterdir()]
        return [name for name in found if name not in OTHERS]

    def files(self) -> dict[str, bytes]:
        """The network configurations."""
        return {path.name: path.read_bytes() for path in self.places.conf_dir.iterdir()}

    def uninstall(self, *, purge: bool = False) -> Uninstalled:
        return installer.uninstall(
            self.places, lambda: self.kernel.unlink(missing_ok=True), purge=purge
        )


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no runtime that could still call the plugin."""
    monkeypatch.setattr(installer, "_QUIET_S", 0)


@pytest.fixture(params=["10-flannel.conflist", "10-bridge.conf"])
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Node:
    node = Node(tmp_path)
    frozen.made(node.places.plugin_dir)
    node.places.conf_dir.mkdir()
    node.places.bin_dir.mkdir()
    for other in OTHERS:
        (node.places.bin_dir / other).touch()
    content = FLANNEL if request.param.endswith("list") else SINGLE
    (node.places.conf_dir / request.param).write_bytes(content)
    return node


def test_there_and_back(node: Node) -> None:
    before = node.files()
    done = installer.install(node.places, PLAIN)
    assert done.program_changed
    assert done.conf.changed
    network = runtimes.crio(node.places.conf_dir, node.places.bin_dir)
    assert network is not None
    assert network != network.without_us()

    inodes = {path: path.lstat().st_ino for path in node.folder.rglob("*")}
    again = installer.install(node.places, PLAIN)
    assert not again.program_changed
    assert not again.conf.changed
    assert {path: path.lstat().st_ino for path in node.folder.rglob("*")} == inodes

    node.kernel.touch()
    left = node.uninstall()
    assert left.conf.changed
    assert left.left_stub
    assert not node.kernel.exists()
    assert node.files() == before
    assert node.programs() == [names.PLUGIN]
    assert node.uninstall() == Uninstalled(Outcome(None, False, ()), False, True, [])
    assert node.uninstall(purge=True).left_stub is False
    assert node.programs() == []


@pytest.mark.usefixtures("hasty")
def test_an_entry_that_is_put_back_meanwhile_goes_too(node: Node) -> None:
    """By a program that has read the file before."""
    before = node.files()
    installer.install(node.places, PLAIN)
    installed = node.files()

    def put_back() -> None:
        for name, content in installed.items():
            (node.places.conf_dir / name).write_bytes(content)

    assert installer.uninstall(node.places, put_back, purge=False).conf.changed
    assert node.files() == before


def test_folders_that_are_told_are_absolute() -> None:
    """The plugin, which reads them in our entry, is started in another folder."""
    parsed = build_parser().parse_args(["install", "--state-dir", "run/tb", "--bpffs", "b"])
    assert (parsed.state_dir, parsed.bpffs) == (Path.cwd() / "run/tb", Path.cwd() / "b")


def test_a_folder_in_which_the_runtime_does_not_look(node: Node) -> None:
    """K3s' configuration, say, and the plugins' folder of other distributions."""
    before = node.files()
    wrong = replace(node.places, bin_dir=node.folder / "wrong")
    with pytest.raises(DoesNotRun, match=r"look for plugins in .*/wrong\? (flannel|bridge), which"):
        installer.install(wrong, PLAIN)
    assert not wrong.bin_dir.exists()
    wrong.bin_dir.mkdir()  # as the runtime of the agent's pod does
    (wrong.bin_dir / "portmap").touch()  # another packager's plugins
    with pytest.raises(DoesNotRun, match="name its folder with --cni-bin-dir"):
        installer.install(wrong, PLAIN)
    (wrong.bin_dir / "portmap").unlink()
    assert list(wrong.bin_dir.iterdir()) == []
    assert node.files() == before

    (wrong.bin_dir / "flannel").symlink_to("/only/on/the/node")
    (wrong.bin_dir / "bridge").symlink_to("/only/on/the/node")
    assert installer.install(wrong, PLAIN).conf.changed
    for other in OTHERS:  # its owner replaces it just now
        (wrong.bin_dir / other).unlink()
    assert not installer.install(wrong, PLAIN).conf.changed


def test_what_is_withdrawn_is_kept_wherever_it_stands(node: Node) -> None:
    """A configuration that has come since, and is the first one now, is without us."""
    installer.install(node.places, Entry({"scope": "all"}, {}))
    first = node.places.conf_dir / "00-first.conflist"
    first.write_text(json.dumps({**json.loads(FLANNEL), "name": "first"}))
    node.places.files.link.resolve().write_text("#!/bin/sh\nexit 3\n")
    break_source(node)
    with pytest.raises(installer.Withdrawn):
        installer.install(node.places, PLAIN)
    assert json.loads(node.files()["entry.tcpip-bypass"])["scope"] == "all"


@pytest.mark.parametrize("name", ["00-multus.conf", "00-multus.conflist"])
def test_what_still_names_us_keeps_the_stub(node: Node, name: str) -> None:
    """Multus without daemon has copied a list with our entry, and does not look again."""
    installer.install(node.places, PLAIN)
    copied = json.dumps({"plugins": [{"type": names.PLUGIN}]})
    multus = {"type": "multus", "delegates": [json.loads(copied)]}
    head = {"cniVersion": "1.0.0", "name": "multus-cni-network"}
    whole = {**head, **multus} if name.endswith(".conf") else {**head, "plugins": [multus]}
    (node.places.conf_dir / name).write_text(json.dumps(whole))
    left = node.uninstall(purge=True)
    assert left.left_stub
    assert any(name in problem for problem in left.conf.problems), left
    (node.places.conf_dir / name).unlink()
    other = {"type": "istio-cni", "exclude_namespaces": [names.PLUGIN]}
    whole = {**head, "plugins": [{"type": "bridge"}, other]}
    (node.places.conf_dir / "00-named.conflist").write_text(json.dumps(whole))
    assert not node.uninstall(purge=True).left_stub


def test_purge_at_once(node: Node) -> None:
    before = node.files()
    installer.install(node.places, PLAIN)
    assert not node.uninstall(purge=True).left_stub
    assert node.programs() == []
    assert node.files() == before


def test_uninstall_where_it_was_never_installed(node: Node) -> None:
    before = sorted(node.folder.rglob("*"))
    done = node.uninstall()
    assert not done.conf.changed
    assert not done.program_removed
    assert not done.left_stub
    assert sorted(node.folder.rglob("*")) == before
    shutil.rmtree(node.places.conf_dir)
    assert not node.uninstall().conf.changed


def test_folders_that_are_not_there_yet(node: Node) -> None:
    shutil.rmtree(node.places.conf_dir)
    done = installer.install(node.places, PLAIN)
    assert done.program_changed
    assert done.conf.conflist is None
    assert "no network configuration" in done.conf.problems[0]
    assert not node.places.conf_dir.exists()
    assert node.places.files.link.exists()


def test_without_a_plugin_no_entry_is_made(node: Node) -> None:
    """A configuration that names a missing program stops every pod."""
    shutil.rmtree(node.places.plugin_dir)
    before = node.files()
    with pytest.raises(InstallError):
        installer.install(node.places, PLAIN)
    assert node.files() == before


@pytest.mark.parametrize(
    ("fails", "what"),
    [
        ((Path, "mkdir"), "plugin"),
        ((shutil, "copytree"), "plugin"),
        ((ConfDir, "put_in"), "conflist"),
    ],
)
def test_the_agent_counts_what_the_full_disk_has_kept_out(
    node: Node, monkeypatch: pytest.MonkeyPatch, fails: tuple[object, str], what: str
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    settings = Settings(node.places, PLAIN, [], [], [], (), None, None, once=True)
    of_agent = program.Node(node.folder / "bpffs", node.folder / "state")
    metrics = Metrics(of_agent)
    agent = Agent(of_agent, settings, metrics, Health())
    with monkeypatch.context() as patched:
        patched.setattr(*fails, refuse)
        assert "No space left" in str(agent._files.run(time.monotonic))
    failed = re.findall(r'repair_errors_total{what="(\w+)"} 1\.0', metrics.render().decode())
    assert failed == [what]


def break_source(node: Node) -> None:
    """The version that would be installed now ends with an error on this node."""
    (node.places.plugin_dir / names.PLUGIN).write_text("#!/bin/sh\nexit 3\n")


def test_what_the_node_cannot_run_is_not_named(node: Node) -> None:
    before = node.files()
    break_source(node)
    node.places.bin_dir.mkdir(parents=True, exist_ok=True)
    with pytest.raises(DoesNotRun, match="the node cannot run the plugin: it ends with 3"):
        installer.install(node.places, PLAIN)
    assert node.files() == before
    assert node.programs() == []


def test_what_the_node_can_no_longer_run_is_named_no_more(node: Node) -> None:
    before = node.files()
    options = {"excludeNamespaces": ["shop"]}
    installer.install(node.places, Entry(options, {}))
    installed = node.files()
    program = node.places.files.link.resolve()
    whole = program.read_text()
    program.write_text("#!/bin/sh\nexit 3\n")
    break_source(node)
    with pytest.raises(installer.Withdrawn, match=r"no longer has our entry"):
        installer.install(node.places, PLAIN)
    left = node.files()
    assert json.loads(left.pop("entry.tcpip-bypass"))["excludeNamespaces"] == ["shop"]
    assert left == before
    assert node.places.files.has_stub
    with pytest.raises(DoesNotRun, match="it ends with 3") as raised:
        installer.install(node.places, PLAIN)
    assert not isinstance(raised.value, installer.Withdrawn)

    (node.places.plugin_dir / names.PLUGIN).write_text(whole)
    assert installer.install(node.places, PLAIN).conf.changed
    assert node.files() == installed, "with its options"


def test_an_entry_that_cannot_be_taken_out_names_a_stub(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    installer.install(node.places, PLAIN)
    installed = node.files()

    def fail(_: ConfDir) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(ConfDir, "withdraw", fail)
        patched.setattr(trial, "why_not", lambda *_: "its libraries are lost")
        with pytest.raises(DoesNotRun, match=r"our entry cannot be taken out: .*Read-only"):
            installer.install(node.places, PLAIN)
    assert node.files() == installed
    check_stub(node)


def check_stub(node: Node) -> None:
    """It is the starter of the plugin that was to be installed."""
    assert node.places.files.has_stub
    starter = node.places.plugin_dir / names.PLUGIN
    assert node.places.files.link.read_bytes() == starter.read_bytes()


def test_an_entry_that_is_not_ours_names_a_stub(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Multus has copied it. The old plugin has gone, and the new one does not run."""
    delegate = {"plugins": [{"type": names.PLUGIN}]}
    multus = {"cniVersion": "1.0.0", "name": "m", "type": "multus", "delegates": [delegate]}
    (node.places.conf_dir / "20-multus.conf").write_text(json.dumps(multus))
    monkeypatch.setattr(trial, "why_not", lambda *_: "its libraries are lost")
    with pytest.raises(DoesNotRun):
        installer.install(node.places, PLAIN)
    check_stub(node)


def test_a_stub_is_not_named(node: Node) -> None:
    """No pod would be accelerated, and nothing would tell."""
    installer.install(node.places, PLAIN)
    node.places.files.put_stub()
    break_source(node)
    with pytest.raises(installer.Withdrawn):
        installer.install(node.places, PLAIN)
    network = runtimes.crio(node.places.conf_dir)
    assert network is not None
    assert network == network.without_us()


def test_uninstall_forgets_what_was_withdrawn(node: Node) -> None:
    before = node.files()
    installer.install(node.places, Entry({"scope": "all"}, {}))
    node.places.files.put_stub()
    break_source(node)
    with pytest.raises(installer.Withdrawn):
        installer.install(node.places, PLAIN)
    node.uninstall()
    assert node.files() == before


@pytest.mark.usefixtures("hasty")
def test_what_cannot_be_tried_is_refused_and_left(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is known of the plugin then: neither is it named anew, nor is it taken out."""
    before = node.files()

    def fail(*_: object) -> NoReturn:
        raise trial.NotTried("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(trial, "why_not", fail)
        with pytest.raises(InstallError, match="could not be tried: no memory"):
            installer.install(node.places, PLAIN)
        assert node.files() == before
    installer.install(node.places, PLAIN)
    installed = node.files()
    monkeypatch.setattr(trial, "why_not", fail)
    with pytest.raises(InstallError, match="could not be tried: no memory"):
        installer.install(node.places, PLAIN)
    assert node.files() == installed


def test_program_stays_as_long_as_it_is_named(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    installer.install(node.places, PLAIN)
    node.kernel.touch()

    def refuse(*_: object) -> NoReturn:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patched:
        for call in ("rename", "unlink"):
            patched.setattr(os, call, refuse)
        with pytest.raises(OSError, match="Read-only"):
            node.uninstall()
    network = runtimes.crio(node.places.conf_dir, node.places.bin_dir)
    assert network is not None
    assert network != network.without_us()
    assert node.kernel.exists()


def test_uninstall_waits_for_executions(node: Node) -> None:
    installer.install(node.places, PLAIN)
    program = node.places.files.link.resolve()
    program.unlink()
    shutil.copy("/bin/busybox", program)  # its /proc/PID/exe is itself, not a shell
    began = time.monotonic()
    sleeper = subprocess.Popen(["sleep", "1.5"], executable=program)
    reaper = threading.Thread(target=sleeper.wait)
    reaper.start()
    try:
        assert node.uninstall().still_running == []
        assert time.monotonic() - began > 1
        assert sleeper.poll() == 0
    finally:
        sleeper.kill()
        reaper.join()


def dying_at(step: int, act: Callable[[], object]) -> bool:
    """Run it in a child that is killed before its n-th change of the disk; whether it was."""
    child = os.fork()
    if child == 0:
        left = [step]

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return real(*arguments, **options)

            return run

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), "the child failed"
    return status == 9


STEPS = (
    "chmod", "fchmod", "fsync", "link", "mkdir", "open", "rename", "rmdir", "symlink", "unlink",
    "utime",
)  # fmt: skip


def check_has_network(node: Node, expected: runtimes.Network) -> None:
    """Both runtimes have the network from before, and can run us if it names us."""
    for runtime in (runtimes.containerd, runtimes.crio):
        network = runtime(node.places.conf_dir)
        assert network is not None
        assert network.without_us() == expected
        if network != expected:
            assert network.version in runtimes.spoken(node.places.files.link)
            assert not node.places.files.has_stub


@pytest.mark.usefixtures("hasty")
def test_killed_anywhere_while_installing(node: Node) -> None:
    expected = runtimes.crio(node.places.conf_dir)
    assert expected is not None
    before = node.files()
    installer.install(node.places, PLAIN)
    installed = node.files()
    node.uninstall(purge=True)
    steps = 0
    while dying_at(steps, lambda: installer.install(node.places, PLAIN)):
        check_has_network(node, expected)
        assert installer.install(node.places, PLAIN).conf.conflist is not None
        assert node.files() == installed
        assert [path.name for path in node.places.files.store.iterdir()] == [
            node.places.files.wanted
        ]
        node.uninstall(purge=True)
        assert node.files() == before
        assert node.programs() == []
        steps += 1
    assert steps > 20


@pytest.mark.usefixtures("hasty")
def test_killed_anywhere_while_uninstalling(node: Node) -> None:
    expected = runtimes.crio(node.places.conf_dir)
    assert expected is not None
    before, steps = node.files(), 0
    while True:
        installer.install(node.places, PLAIN)
        node.kernel.touch()
        if not dying_at(steps, node.uninstall):
            break
        check_has_network(node, expected)
        assert node.uninstall().left_stub
        assert node.files() == before
        assert node.programs() == [names.PLUGIN]
        steps += 1
    assert steps > 8


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("node", ["10-bridge.conf"], indirect=True)
def test_killed_anywhere_while_taking_over_from_the_first_edition(node: Node) -> None:
    """It had made 10-bridge.conf a list, and had moved it aside."""
    expected = runtimes.crio(node.places.conf_dir)
    assert expected is not None
    single = node.places.conf_dir / "10-bridge.conf"
    before = node.files()
    done = installer.install(node.places, Entry({"scope": "all"}, {})).conf
    assert done.conflist is not None
    wanted = node.files()
    kept = single.with_name("10-bridge.conf.tcpip-bypass")

    def first_edition() -> None:
        assert done.conflist is not None
        single.rename(kept)
        done.conflist.rename(single.with_suffix(".conflist"))

    first_edition()
    steps = 0
    while dying_at(steps, lambda: installer.install(node.places, PLAIN)):
        check_has_network(node, expected)
        installer.install(node.places, PLAIN)
        kept.unlink(missing_ok=True)  # which no runtime reads, and uninstall sweeps
        assert node.files() == wanted
        first_edition()
        steps += 1
    assert steps > 8
    node.uninstall()
    assert node.files() == before


def test_two_installs_at_once(node: Node) -> None:
    """The second one finds no work left."""
    done = []
    both = [
        threading.Thread(target=lambda: done.append(installer.install(node.places, PLAIN)))
        for _ in range(2)
    ]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert sorted(each.program_changed for each in done) == [False, True]
    assert sorted(each.conf.changed for each in done) == [False, True]
    network = runtimes.crio(node.places.conf_dir, node.places.bin_dir)
    assert network is not None
    assert network != network.without_us()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"scope": "everything"}, "scope: 'everything' is not one of"),
        ({"excludePorts": ["9-"]}, "excludePorts.0"),
        ({"excludePorts": ["900-100"]}, "excludePorts"),
        ({"skope": "all"}, "skope: not an option"),
        ({"type": "bridge"}, "type: not an option"),
        ({"bpffs": "/x"}, "bpffs: not an option"),
        ({"ipMasq": True}, "unsupported field ipMasq"),
        ({"scope": 1, "mode": 2}, "scope: 1 is not one of.*; mode: 2 is not one of"),
    ],
)
def test_options_are_checked(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InstallError, match=why):
        installer.entry(Path(names.BPFFS), Path(names.STATE_DIR), options)


def test_options_as_text_or_file(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text('{"scope": "all"}')
    assert installer.parse_options(str(file)) == {"scope": "all"}
    assert installer.parse_options(' {"scope": "all"}') == {"scope": "all"}
    for wrong in ("{", "{} {}", '{"a": NaN}'):
        with pytest.raises(InstallError, match="not a JSON object"):
            installer.parse_options(wrong)
    with pytest.raises(FileNotFoundError):
        installer.parse_options(str(tmp_path / "absent"))
    with pytest.raises(InstallError, match="empty"):
        installer.options_of("")
    assert installer.options_of(None) is None


def on_a_disk(node: Node, mount: str, command: str, *options: str) -> tuple[int, str]:
    """The node program, with the folder's own file system mounted over one of its folders."""
    script = f"""
        set -e
        mkdir -p {node.places.bin_dir}
        {mount}
        exec {PROGRAM} {command} --cni-conf-dir {node.places.conf_dir} \
            --cni-bin-dir {node.places.bin_dir} --plugin-dir {node.places.plugin_dir} \
            --bpffs {node.folder}/bpffs --state-dir {node.folder}/state "$@"
    """
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def read_only(folder: Path) -> str:
    return f"mount --bind {folder} {folder}; mount -o remount,bind,ro {folder}"


@pytest.mark.parametrize("node", ["10-flannel.conflist"], indirect=True)
def test_disks_that_refuse(node: Node) -> None:
    """As an operator sees it: what is wrong, where, and that no file was changed."""
    before = node.files()
    options = json.dumps({"scope": "all"})
    for folder in (node.places.conf_dir, node.places.bin_dir):
        folder.mkdir(exist_ok=True)
        code, said = on_a_disk(node, read_only(folder), "install", "--conf-json", options)
        assert code == 1
        assert (
            f"cannot be written, and nothing was changed; is it mounted read-only?: '{folder}'"
            in said
        )
        assert node.files() == before
        assert node.programs() == []

    bin_dir = node.places.bin_dir
    full = f"mount -t tmpfs -o size=4k none {bin_dir}; touch {bin_dir}/flannel"
    code, said = on_a_disk(node, full, "install")
    assert code == 1
    assert "No space left on device" in said
    assert node.files() == before

    code, said = on_a_disk(node, ":", "install", "--conf-json", options)
    assert code == 0, said
    assert "10-flannel.conflist: our entry is in" in said
    assert '"scope": "all"' in node.files()["10-flannel.conflist"].decode()

    code, said = on_a_disk(node, read_only(node.places.conf_dir), "uninstall")
    assert code == 1
    assert "Read-only file system" in said
    assert runtimes.crio(node.places.conf_dir, node.places.bin_dir) is not None
    assert not node.places.files.has_stub

    code, said = on_a_disk(node, ":", "uninstall")
    assert code == 0, said
    assert "our entry is out" in said
    assert "a stub" in said
    assert node.files() == before
    code, said = on_a_disk(node, ":", "uninstall", "--purge")
    assert code == 0, said
    assert node.programs() == []
