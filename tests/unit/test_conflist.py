# SPDX-License-Identifier: Apache-2.0
"""Our entry in other programs' network configurations: every case of tests/fixtures/conflists.

Where a case names no change, each byte, inode and time stays.
"""

from __future__ import annotations

import json
import os
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni_plugin import names
from install import conflist, installer
from install.conf_dir import ConfDir, Outcome
from install.conflist import ConfError, Entry
from tests.unit import networks, runtimes

CASES = networks.all_networks()
PLAIN = Entry(None, {})


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


def entry_of(case: networks.Network) -> Entry:
    return installer.entry(Path(names.BPFFS), Path(names.STATE_DIR), case.options)


def stats_of(folder: Path) -> dict[str, tuple[int, int]]:
    if not folder.exists():
        return {}
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.iterdir()}


def test_there_are_enough_cases() -> None:
    """A glob that finds no case would pass."""
    assert len(CASES) >= 40


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: networks.Network, tmp_path: Path) -> None:
    conf = ConfDir(tmp_path / "net.d")
    if case.before is not None:
        conf.path.mkdir()
        for name, content in case.before.items():
            (conf.path / name).write_bytes(content)
    network = runtimes.crio(conf.path)

    stats = stats_of(conf.path)
    done = conf.put_in(entry_of(case))
    assert files_in(conf.path) == case.installed
    assert done.changed == (case.installed != (case.before or {}))
    assert done.changed or stats_of(conf.path) == stats
    assert (done.conflist and done.conflist.name) == case.uses
    for problem, text in zip(done.problems, case.problems, strict=True):
        assert text in problem
    _check_runtimes(conf, network, case.uses)

    stats = stats_of(conf.path)
    again = conf.put_in(entry_of(case))
    assert not again.changed
    assert stats_of(conf.path) == stats

    conf.take_out()
    assert files_in(conf.path) == case.removed
    assert not conf.take_out().changed


def _check_runtimes(conf: ConfDir, before: runtimes.Network | None, uses: str | None) -> None:
    """The runtime's network is the one from before, with us once and not first, or not at all."""
    after = runtimes.crio(conf.path)
    if uses is None:
        assert after == before
        assert conf.ours() is None
        return
    assert after is not None
    assert before is not None
    assert after.without_us() == before.without_us()
    types = [plugin["type"] for plugin in after.plugins]
    assert types.count(names.PLUGIN) == 1
    assert types[0] != names.PLUGIN
    ours = conf.ours()
    assert ours is not None
    assert (ours.path.name, ours.network, ours.cni_version) == (uses, after.name, after.version)
    assert ours.entry in after.plugins


# A machine that is busy with other tests is no mistake.
RUNS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TYPED = ("name", "cniVersion", "capabilities", "ipam", "dns")  # of one type, to a runtime
KEYS = st.text(string.ascii_letters + 'é"\\\n]}', min_size=1, max_size=6).filter(
    lambda key: key not in TYPED
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
PLUGINS = st.builds(
    lambda kind, rest: {**rest, "type": kind},
    st.sampled_from(["bridge", "calico", "istio-cni", "portmap", names.PLUGIN]),
    st.dictionaries(KEYS, VALUES, max_size=3),
)
LISTS = st.builds(
    lambda rest, plugins: {**rest, "name": "n", "cniVersion": "1.0.0", "plugins": plugins},
    st.dictionaries(KEYS, VALUES, max_size=3),
    st.lists(PLUGINS, min_size=1, max_size=4),
)
LAYOUTS = st.sampled_from([None, 0, 1, 2, 4, "\t"])
SPACES = st.sampled_from(["", "\n", " \r\n\t"])


@RUNS
@given(LISTS, LAYOUTS, st.booleans(), SPACES)
def test_any_list(value: dict[str, Any], indent: int | None, ascii_only: bool, space: str) -> None:
    others = [plugin for plugin in value["plugins"] if plugin["type"] != names.PLUGIN]
    text = space + json.dumps(value, indent=indent, ensure_ascii=ascii_only) + space
    if not others:
        with pytest.raises(ConfError):
            conflist.with_entry(text, PLAIN)
        return
    bare = conflist.without_entry(text)
    assert json.loads(bare) == {**value, "plugins": others}

    once = conflist.with_entry(text, PLAIN)
    assert conflist.with_entry(once, PLAIN) == once
    types = [plugin["type"] for plugin in json.loads(once)["plugins"]]
    assert types.count(names.PLUGIN) == 1
    assert types.index(names.PLUGIN) > 0
    assert json.loads(conflist.without_entry(once)) == json.loads(bare)
    if len(others) == len(value["plugins"]):
        assert conflist.without_entry(once) == text


@RUNS
@given(PLUGINS.filter(lambda plugin: plugin["type"] != names.PLUGIN), LAYOUTS, SPACES)
def test_any_single(plugin: dict[str, Any], indent: int | None, space: str) -> None:
    value = {**plugin, "name": "n", "cniVersion": "0.4.0"}
    text = space + json.dumps(value, indent=indent) + space
    as_list = json.loads(conflist.list_of_single(text, "file.conf"))
    assert as_list == {"name": "n", "cniVersion": "0.4.0", "plugins": [value]}


@RUNS
@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "surrogateescape")))
def test_any_text(text: str) -> None:
    with pytest.raises(ConfError):
        conflist.with_entry(text, PLAIN)


def test_nested_too_deeply() -> None:
    with pytest.raises(ConfError):
        conflist.with_entry("[" * 100_000, PLAIN)


FLANNEL = networks.text("flannel.conflist")
SINGLE = '{"cniVersion": "0.4.0", "name": "pods", "type": "ptp", "mtu": 1450}\n'


@pytest.fixture
def conf(tmp_path: Path) -> ConfDir:
    folder = tmp_path / "net.d"
    folder.mkdir()
    return ConfDir(folder)


def test_mode_and_owner_are_kept(conf: ConfDir) -> None:
    for name, text in (("10-list.conflist", FLANNEL), ("05-single.conf", SINGLE)):
        path = conf.path / name
        path.write_text(text)
        path.chmod(0o640)
        os.chown(path, 1234, 2345)
        done = conf.put_in(PLAIN)
        assert done.conflist is not None
        found = done.conflist.stat()
        assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o640, 1234, 2345)
    conf.take_out()
    found = (conf.path / "05-single.conf").stat()
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o640, 1234, 2345)


def test_link_is_written_through(conf: ConfDir, tmp_path: Path) -> None:
    target = tmp_path / "kept" / "real"
    target.parent.mkdir()
    target.write_text(FLANNEL)
    link = conf.path / "10-flannel.conflist"
    link.symlink_to("../kept/real")
    event_before = link.lstat().st_ino
    assert conf.put_in(PLAIN).conflist == link
    assert link.readlink() == Path("../kept/real")
    assert conflist.has_entry(target.read_text())
    assert link.lstat().st_ino != event_before, "no event in the folder that is watched"
    conf.take_out()
    assert target.read_text() == FLANNEL
    assert files_in(tmp_path / "kept") == {"real": FLANNEL.encode()}


def test_single_behind_a_link(conf: ConfDir, tmp_path: Path) -> None:
    target = tmp_path / "single"
    target.write_text(SINGLE)
    link = conf.path / "10-ptp.conf"
    link.symlink_to("../single")
    done = conf.put_in(PLAIN)
    assert done.conflist == conf.path / "10-ptp.conflist"
    conf.take_out()
    assert link.readlink() == Path("../single")
    assert target.read_text() == SINGLE
    assert list(conf.path.iterdir()) == [link]


def test_link_without_a_target_is_reported(conf: ConfDir) -> None:
    """In a container the target may be out of sight, though the runtime sees it."""
    (conf.path / "10-flannel.conflist").symlink_to("/not/mounted/here")
    (done_without, problem) = (conf.put_in(PLAIN).conflist, conf.put_in(PLAIN).problems[0])
    assert done_without is None
    assert "a link to /not/mounted/here, which is not to be seen here" in problem


def at_first_sync(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call `act` when our file is written but not yet in place."""
    real, pending = os.fsync, [act]

    def fsync(fd: int) -> None:
        real(fd)
        if pending:
            pending.pop()()

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("step", ["put_in", "take_out"])
def test_another_writer_is_not_overwritten(
    conf: ConfDir, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = conf.path / "10-flannel.conflist"
    changed = FLANNEL.replace("hairpinMode", "changed")
    path.write_text(FLANNEL)
    if step == "take_out":
        conf.put_in(PLAIN)
        changed = conflist.with_entry(changed, PLAIN)
    at_first_sync(monkeypatch, lambda: path.write_text(changed))
    done = conf.put_in(PLAIN) if step == "put_in" else conf.take_out()
    assert done.changed
    assert "changed" in path.read_text()
    assert conflist.has_entry(path.read_text()) == (step == "put_in")


def test_owner_changes_a_single_while_it_becomes_a_list(
    conf: ConfDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = conf.path / "10-ptp.conf"
    path.write_text(SINGLE)
    at_first_sync(monkeypatch, lambda: path.write_text(SINGLE.replace("1450", "1400")))
    done = conf.put_in(PLAIN)
    assert done.conflist is not None
    assert "1400" in done.conflist.read_text()
    conf.take_out()
    assert files_in(conf.path) == {path.name: SINGLE.replace("1450", "1400").encode()}


def test_owner_writes_a_single_again(conf: ConfDir) -> None:
    """It is the first one again; what we made of the older one is no more than ours to replace."""
    path = conf.path / "10-ptp.conf"
    for mtu in ("1450", "1400"):
        path.write_text(SINGLE.replace("1450", mtu))
        done = conf.put_in(PLAIN)
        assert done.conflist is not None
        assert mtu in done.conflist.read_text()
        assert not path.exists()
    conf.take_out()
    assert files_in(conf.path) == {path.name: SINGLE.replace("1450", "1400").encode()}


def test_list_of_a_single_that_was_changed_stays(conf: ConfDir) -> None:
    (conf.path / "10-ptp.conf").write_text(SINGLE)
    done = conf.put_in(PLAIN)
    assert done.conflist is not None
    with_istio = done.conflist.read_text().replace('"plugins": [', '"plugins": [{"type": "x"}, ')
    done.conflist.write_text(with_istio)
    conf.take_out()
    left = files_in(conf.path)
    assert list(left) == ["10-ptp.conflist"]
    assert [p["type"] for p in json.loads(left["10-ptp.conflist"])["plugins"]] == ["x", "ptp"]


def test_entry_is_taken_out_of_a_list_that_no_runtime_takes(conf: ConfDir) -> None:
    """It may be mended later, when the plugin is gone."""
    path = conf.path / "10-flannel.conflist"
    path.write_text(conflist.with_entry(FLANNEL, PLAIN).replace('"name": "cbr0",', ""))
    assert conf.take_out().changed
    assert path.read_text() == FLANNEL.replace('"name": "cbr0",', "")


@pytest.mark.parametrize("version", ["0.2.0", "1.2.0", ""])
def test_entry_goes_when_its_list_gets_a_version_that_we_do_not_speak(
    conf: ConfDir, version: str
) -> None:
    """The runtime would get an error for every pod; and the entry is back when the version is."""
    path = conf.path / "10-flannel.conflist"
    path.write_text(FLANNEL)
    conf.put_in(PLAIN)
    with_entry = path.read_text()
    old, new = '"cniVersion": "0.3.1"', f'"cniVersion": "{version}"'
    assert old in with_entry
    path.write_text(with_entry.replace(old, new))
    assert conf.lacks(PLAIN)
    done = conf.put_in(PLAIN)
    assert done == Outcome(None, True, done.problems)
    assert "10-flannel.conflist no longer has our entry: its cniVersion is" in done.problems[0]
    assert path.read_text() == FLANNEL.replace(old, new)
    assert not conf.lacks(PLAIN)
    assert not conf.put_in(PLAIN).changed
    path.write_text(FLANNEL)
    conf.put_in(PLAIN)
    assert path.read_text() == with_entry


def test_entry_in_a_file_that_does_not_parse_is_reported(conf: ConfDir) -> None:
    path = conf.path / "10-flannel.conflist"
    broken = conflist.with_entry(FLANNEL, PLAIN)[:-5]
    path.write_text(broken)
    done = conf.take_out()
    assert done == Outcome(None, False, done.problems)
    assert "10-flannel.conflist is left alone: it is not JSON" in done.problems[0]
    assert path.read_text() == broken


def test_folders_go_into_the_entry(conf: ConfDir) -> None:
    (conf.path / "10-flannel.conflist").write_text(FLANNEL)
    conf.put_in(installer.entry(Path("/sys/fs/bpf/other"), Path(names.STATE_DIR), {"scope": "all"}))
    ours = conf.ours()
    assert ours is not None
    assert ours.entry["bpffs"] == "/sys/fs/bpf/other"
    assert "stateDir" not in ours.entry
    conf.put_in(installer.entry(Path(names.BPFFS), Path(names.STATE_DIR), None))
    ours = conf.ours()
    assert ours is not None
    assert "bpffs" not in ours.entry
    assert ours.entry["scope"] == "all"
