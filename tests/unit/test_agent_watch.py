# SPDX-License-Identifier: Apache-2.0
"""Folders that come, go, and are replaced while they are watched."""

from __future__ import annotations

import errno
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from install.program.agent.watch import Watch
from tests.unit.cases import ROOT


@pytest.fixture
def watch() -> Iterator[Watch]:
    made = Watch()
    yield made
    made.close()


def wakes(watch: Watch) -> bool:
    """Whether a poll would return at once."""
    return bool(select.select(watch.descriptors(), [], [], 0)[0])


def test_each_topic_is_told_apart(watch: Watch, tmp_path: Path) -> None:
    for name in ("conf", "bin"):
        (tmp_path / name).mkdir()
    watch.watch({"files": {tmp_path / "conf"}, "programs": {tmp_path / "bin"}})
    assert watch.changed() == set()
    assert not wakes(watch)
    (tmp_path / "conf" / "10-a.conflist").write_text("{}")
    assert wakes(watch)
    assert watch.changed() == {"files"}
    (tmp_path / "bin" / "tcpip-bypass").touch()
    assert watch.changed() == {"programs"}
    assert watch.changed() == set()


def test_every_kind_of_change_counts(watch: Watch, tmp_path: Path) -> None:
    folder = tmp_path / "conf"
    folder.mkdir()
    file = folder / "10-a.conflist"
    file.write_text("{}")
    watch.watch({"files": {folder}})
    changes: list[Callable[[], object]] = [
        lambda: file.write_text("[]"),
        lambda: file.chmod(0o600),
        lambda: file.rename(folder / "20-b.conflist"),
        lambda: (folder / "05-c.conf").symlink_to("nowhere"),
        (folder / "20-b.conflist").unlink,
    ]
    for change in changes:
        change()
        assert watch.changed() == {"files"}
    file.write_text("{}")
    watch.changed()
    file.read_text()
    assert watch.changed() == set()  # a runtime that reads is no change


def test_a_folder_that_does_not_exist_yet(watch: Watch, tmp_path: Path) -> None:
    folder = tmp_path / "etc" / "cni" / "net.d"
    watch.watch({"files": {folder}})
    for made in (folder.parent.parent, folder.parent, folder, folder / "10-a.conflist"):
        made.mkdir()
        assert watch.changed() == {"files"}, made


def test_a_folder_that_is_removed_and_comes_again(watch: Watch, tmp_path: Path) -> None:
    folder = tmp_path / "net.d"
    folder.mkdir()
    watch.watch({"files": {folder}})
    shutil.rmtree(folder)
    assert watch.changed() == {"files"}
    folder.mkdir()
    assert watch.changed() == {"files"}
    (folder / "10-a.conflist").touch()
    assert watch.changed() == {"files"}


def test_a_folder_that_another_one_replaces(watch: Watch, tmp_path: Path) -> None:
    folder, other = tmp_path / "net.d", tmp_path / "other"
    folder.mkdir()
    other.mkdir()
    watch.watch({"files": {folder}})
    folder.rename(tmp_path / "old")
    assert watch.changed() == {"files"}
    other.rename(folder)
    assert watch.changed() == {"files"}
    (folder / "10-a.conflist").touch()
    assert watch.changed() == {"files"}
    (tmp_path / "old" / "10-a.conflist").touch()
    assert watch.changed() == set()


def test_what_is_no_longer_asked_for_is_not_told(watch: Watch, tmp_path: Path) -> None:
    folder = tmp_path / "net.d"
    folder.mkdir()
    watch.watch({"files": {folder}})
    watch.watch({})
    (folder / "10-a.conflist").touch()
    assert watch.changed() == set()


def test_without_inotify_everything_may_have_changed(
    watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("install.program.agent.watch.INotify", refuse)
        watch.watch({"files": {tmp_path}})
        assert watch.descriptors() == []
        assert watch.changed() == {"files"}
    watch.watch({"files": {tmp_path}})  # there is one again
    assert watch.changed() == set()
    (tmp_path / "10-a.conflist").touch()
    assert watch.changed() == {"files"}


# In a user namespace of its own, with limits of its own.
WITHOUT_A_WATCH = """
import sys
from pathlib import Path
from install.program.agent.watch import Watch

limit = Path("/proc/sys/user/max_inotify_watches")
folders = {path.name: {path} for path in map(Path, sys.argv[1:])}
usual = limit.read_text()
limit.write_text(str(len(folders) - 1))
watch = Watch()
for _ in range(2):
    watch.watch(folders)
    assert watch.descriptors() == []
    assert watch.changed() == folders.keys()
limit.write_text(usual)
watch.watch(folders)
assert watch.changed() == set()
for name, (folder,) in folders.items():
    (folder / "new").touch()
    assert watch.changed() == {name}
"""


def test_without_a_watch_left_everything_may_have_changed(tmp_path: Path) -> None:
    folders = [tmp_path / "conf", tmp_path / "bin"]
    for folder in folders:
        folder.mkdir()
    unshare = ["unshare", "--user", "--map-root-user", "--"]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", WITHOUT_A_WATCH, *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    warning, over = done.stderr.splitlines()
    assert "changes are seen late" in warning
    assert "No space left on device" in warning
    assert "at once again" in over
