# SPDX-License-Identifier: Apache-2.0
"""The plugin's folder on a node: swapped in whole, repaired, upgraded and removed under load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from cni_plugin import names
from install.program.plugin_files import DoesNotRun, InstallError, PluginFiles, digest
from tests.bed.bed import FROZEN_PLUGIN
from tests.unit import frozen, runtimes

CONF = {
    "cniVersion": "1.0.0",
    "name": "net",
    "type": "tcpip-bypass",
    "prevResult": {"cniVersion": "1.0.0", "interfaces": [], "ips": [], "dns": {}},
}
ENVIRONMENT = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "c1",
    "CNI_NETNS": "/no/such/netns",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/",
}


@pytest.fixture
def files(tmp_path: Path) -> PluginFiles:
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    return PluginFiles(frozen.made(tmp_path / "source"), bin_dir)


def release(files: PluginFiles) -> str:
    """What the runtime finds and runs."""
    return subprocess.run([files.link], capture_output=True, text=True, check=True).stdout


def other(files: PluginFiles, name: str) -> PluginFiles:
    return PluginFiles(frozen.made(files.source.with_name(name), name), files.bin_dir)


def stored(files: PluginFiles) -> list[str]:
    return sorted(path.name for path in files.store.iterdir())


def test_install_twice(files: PluginFiles) -> None:
    assert not files.is_intact()
    assert files.install()
    assert files.is_intact()
    assert release(files) == "1"
    assert not files.link.readlink().is_absolute()
    before = files.link.lstat().st_ino
    assert not files.install()
    assert files.link.lstat().st_ino == before


def test_upgrade_and_downgrade(files: PluginFiles) -> None:
    files.install()
    newer = other(files, "2")
    assert not newer.is_intact()
    assert newer.install()
    assert release(files) == "2"
    assert stored(files) == sorted([files.wanted, newer.wanted])
    copied = (files.store / files.wanted).stat().st_ino
    assert files.install()
    assert release(files) == "1"
    assert (files.store / files.wanted).stat().st_ino == copied, "it was there already"
    other(files, "3").install()
    assert newer.wanted not in stored(files), "only the one from before is kept"


@pytest.mark.parametrize(
    "damage",
    [
        lambda files: files.link.unlink(),
        lambda files: (files.link.unlink(), files.link.write_text("of another program")),
        lambda files: (files.link.unlink(), files.link.symlink_to("../lib/old/tcpip-bypass")),
        lambda files: (files.store / files.wanted / "tcpip-bypass").write_text("#!/bin/sh\nexit 1"),
        lambda files: (files.store / files.wanted / "tcpip-bypass").chmod(0o644),
        lambda files: (files.store / files.wanted / "_internal" / "release").unlink(),
        lambda files: (files.store / files.wanted / "_internal" / "more").write_text(""),
        lambda files: (files.store / files.wanted).rename(files.bin_dir / "gone"),
        lambda files: files.store.rename(files.bin_dir / "gone"),
    ],
)
def test_damage_is_repaired(files: PluginFiles, damage: object) -> None:
    files.install()
    assert callable(damage)
    damage(files)
    assert not files.is_intact()
    assert files.install()
    assert files.is_intact()
    assert release(files) == "1"


def test_files_are_for_everybody(files: PluginFiles) -> None:
    (files.source / "_internal" / "release").chmod(0o600)
    umask = os.umask(0o077)
    try:
        files.install()
    finally:
        os.umask(umask)
    folder = files.link.resolve().parent
    assert (folder / "_internal" / "release").stat().st_mode & 0o777 == 0o644
    for path in (files.store, folder, folder / "_internal", folder / "tcpip-bypass"):
        assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("#!/bin/sh\nexit 3\n", "it ends with 3"),
        ("#!/bin/sh\necho '{}'\n", "it answers VERSION with"),
        ("#!/bin/sh\necho nothing\n", "it answers VERSION with 'nothing'"),
        ("#!/no/such/interpreter\n", "No such file or directory"),
        ("\x7fELF of another machine", "Exec format error"),
    ],
)
def test_what_does_not_run_is_not_installed(files: PluginFiles, program: str, why: str) -> None:
    files.install()
    newer = other(files, "2")
    (newer.source / "tcpip-bypass").write_text(program)
    with pytest.raises(InstallError, match=why):
        newer.install()
    assert files.is_intact()
    assert stored(files) == [files.wanted]


def test_one_that_was_killed_may_run(files: PluginFiles) -> None:
    """For want of memory, say: nothing is known, and nothing is taken out."""
    shutil.copy(FROZEN_PLUGIN / names.PLUGIN, files.source)
    loader = files.source / "ld-glibc.so.2"
    loader.write_text("#!/bin/sh\nkill -9 $$\n")
    loader.chmod(0o755)
    with pytest.raises(InstallError, match=r"could not be tried: .*it was killed") as raised:
        files.install()
    assert not isinstance(raised.value, DoesNotRun)


def test_no_source(files: PluginFiles) -> None:
    absent = PluginFiles(files.source / "absent", files.bin_dir)
    with pytest.raises(InstallError, match=r"no frozen plugin in .*/absent; run `make build`"):
        absent.install()
    assert list(files.bin_dir.iterdir()) == []


def test_digest_tells_folders_apart(files: PluginFiles) -> None:
    """Names, contents, kinds and executability, and no two of them can be mixed up."""
    seen = {digest(files.source)}
    internal = files.source / "_internal"
    for command in (
        "echo b >a",
        "chmod +x a",
        "mv a ab",
        ": >ab",
        "rm ab",
        "ln -s release ab",
        "rm ab && mkdir ab",
    ):
        seen.add(digest(files.source))
        subprocess.run(["sh", "-c", command], cwd=internal, check=True)
    seen.add(digest(files.source))
    assert len(seen) == 7, "six changes; without `ab` the folder is what it was at first"


def test_stub(files: PluginFiles) -> None:
    shutil.copytree(FROZEN_PLUGIN, files.source, dirs_exist_ok=True)
    files.install()
    files.put_stub()
    assert files.has_stub
    assert files.remove()
    assert list(files.bin_dir.iterdir()) == [files.link]

    assert runtimes.spoken(files.link) == list(names.CNI_VERSIONS)

    before = files.link.stat().st_ino
    files.put_stub()
    assert not files.remove()
    assert files.link.stat().st_ino == before
    assert files.install(), "the plugin takes the stub's place"
    assert files.is_intact()
    files.put_stub()
    files.remove()
    files.remove_stub()
    assert list(files.bin_dir.iterdir()) == []


def test_remove_what_was_never_there(files: PluginFiles) -> None:
    assert not files.remove()
    files.remove_stub()
    assert not PluginFiles(files.source, files.bin_dir / "absent").remove()


def test_executions_go_on_while_the_plugin_is_replaced(tmp_path: Path) -> None:
    """The real one: PyInstaller's bootloader, and modules that are imported late."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    files = PluginFiles(FROZEN_PLUGIN, bin_dir)
    files.install()
    assert runtimes.spoken(files.link) == list(names.CNI_VERSIONS)
    conf = json.dumps({**CONF, "bpffs": f"{tmp_path}/bpffs", "stateDir": f"{tmp_path}/state"})
    running = subprocess.Popen(
        [files.link], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 30
        while running.pid not in files.running():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for release in ("2", "3"):
            PluginFiles(frozen.made(tmp_path / release, release), bin_dir).install()
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
        assert sorted(files.running()) == sorted([running.pid, *map(int, children.split())])
        assert (files.store / files.wanted).exists(), "an execution runs from it"
        answer, _ = running.communicate(conf, timeout=60)
        assert running.returncode == 0
        assert json.loads(answer)["cniVersion"] == "1.0.0"
        assert files.running() == []
        files.install()
        assert runtimes.spoken(files.link) == list(names.CNI_VERSIONS)
    finally:
        running.kill()
        running.wait()
