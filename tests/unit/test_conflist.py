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
from install.program import conflist, installer
from install.program.conf_dir import ConfDir, Ours, Outcome
from install.program.conflist import ConfError, Entry
from tests.unit import networks, runtimes

CASES = networks.all_networks()
PLAIN = Entry(None, {})


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.exists() else {}


def entry_of(case: networks.Network) -> Entry:
    return installer.entry(Path(names.BPFFS), Path(names.STATE_DIR), case.options)


def has_entry(path: Path) -> bool:
    return bool(conflist.Conflist.parse(path.read_text()).ours())


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

    stats = stats_of(conf.path)
    done = conf.put_in(entry_of(case))
    assert files_in(conf.path) == case.installed
    assert done.changed == (case.installed != (case.before or {}))
    assert done.changed or stats_of(conf.path) == stats
    assert (done.conflist and done.conflist.name) == case.uses
    for problem, text in zip(done.problems, case.problems, strict=True):
        assert text in problem
    after, ours = runtimes.crio(conf.path), conf.ours()

    stats = stats_of(conf.path)
    again = conf.put_in(entry_of(case))
    assert not again.changed
    assert stats_of(conf.path) == stats

    conf.take_out()
    assert files_in(conf.path) == case.removed
    assert not conf.take_out().changed
    _check_runtimes(after, ours, runtimes.crio(conf.path), case.uses)


def _check_runtimes(
    after: runtimes.Network | None,
    ours: Ours | None,
    without: runtimes.Network | None,
    uses: str | None,
) -> None:
    """The runtime's network is the one without us, with us once and not first, or not at all.

    With its name and version: they are how libcni finds the cached result for the DEL of a pod.
    """
    if uses is None:
        assert after == without
        assert ours is None
        return
    assert after is not None
    assert without is not None
    assert after.without_us() == without.without_us()
    types = [plugin["type"] for plugin in after.plugins]
    assert types.count(names.PLUGIN) == 1
    assert types[0] != names.PLUGIN
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
    assert as_list.pop("tcpip-bypass/made-from") == "file.conf"
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
    assert has_entry(target)
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
    assert done.conflist == conf.path / "10-ptp-tcpip-bypass.conflist"
    assert link.readlink() == Path("../single")
    target.write_text(SINGLE.replace("1450", "1400"))
    assert conf.put_in(PLAIN).changed
    assert "1400" in done.conflist.read_text()
    target.write_text(SINGLE)
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


@pytest.mark.parametrize("name", ["05-odd.conf", "05-odd.conflist", "05-odd.conflist.cilium_bak"])
@pytest.mark.parametrize("target", ["nothing", "10-flannel.conflist/nothing", "itself"])
def test_link_that_leads_to_no_file_is_in_no_ones_way(
    conf: ConfDir, name: str, target: str
) -> None:
    link, used = conf.path / name, conf.path / "10-flannel.conflist"
    link.symlink_to(name if target == "itself" else target)
    used.write_text(FLANNEL)
    assert conf.put_in(PLAIN).conflist == used
    ours = conf.ours()
    assert ours is not None
    assert ours.path == used
    assert conf.take_out().conflist == used
    assert used.read_text() == FLANNEL
    assert link.is_symlink()


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
    assert has_entry(path) == (step == "put_in")


@pytest.mark.parametrize("is_there", [False, True])
def test_owner_changes_a_single_while_its_list_is_written(
    conf: ConfDir, is_there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, changed = conf.path / "10-ptp.conf", SINGLE.replace("1450", "1400")
    path.write_text(SINGLE)
    if is_there:
        conf.put_in(PLAIN)
        path.write_text(SINGLE.replace("1450", "1300"))
    at_first_sync(monkeypatch, lambda: path.write_text(changed))
    done = conf.put_in(PLAIN)
    assert done.conflist is not None
    assert "1400" in done.conflist.read_text()
    conf.take_out()
    assert files_in(conf.path) == {path.name: changed.encode()}


def test_owner_writes_a_single_again_and_again(conf: ConfDir) -> None:
    """In place, by rename, as another plugin's, and half: each is followed at the next look."""
    path, part = conf.path / "10-ptp.conf", conf.path / "part"
    path.write_text(SINGLE)
    done = conf.put_in(Entry({"scope": "all"}, {}))
    assert done.conflist is not None
    for text in (SINGLE.replace("1450", "1400"), SINGLE.replace("ptp", "bridge"), SINGLE):
        path.write_text("{")
        half, before = conf.put_in(PLAIN), files_in(conf.path)
        assert half == Outcome(done.conflist, False, half.problems)
        assert "left as it was: 10-ptp.conf: it is not JSON" in half.problems[0]
        part.write_text(text)
        part.rename(path)
        assert conf.lacks(PLAIN)
        assert conf.put_in(PLAIN) == Outcome(done.conflist, True, ())
        assert files_in(conf.path).keys() == before.keys()
        plugin, ours = json.loads(done.conflist.read_text())["plugins"]
        assert plugin == json.loads(text)
        assert ours["scope"] == "all"
    conf.take_out()
    assert files_in(conf.path) == {path.name: SINGLE.encode()}


def test_owner_takes_its_single_away_and_brings_it_again(conf: ConfDir) -> None:
    path = conf.path / "10-ptp.conf"
    for _ in range(2):
        path.write_text(SINGLE)
        assert conf.put_in(PLAIN).conflist == conf.path / "10-ptp-tcpip-bypass.conflist"
        path.unlink()
        assert conf.lacks(PLAIN)
        done = conf.put_in(PLAIN)
        assert done == Outcome(None, True, done.problems)
        assert files_in(conf.path) == {}


def test_owner_makes_its_single_one_that_we_cannot_serve(conf: ConfDir) -> None:
    path = conf.path / "10-ptp.conf"
    for wrong in (
        '"0.2.0", "name": "pods", "type": "ptp"',
        '"0.4.0", "name": "m", "type": "multus"',
    ):
        path.write_text(SINGLE)
        conf.put_in(PLAIN)
        path.write_text(f'{{"cniVersion": {wrong}}}')
        assert conf.put_in(PLAIN).conflist is None
        assert list(files_in(conf.path)) == [path.name]


@pytest.mark.parametrize("mark", ["", "/", "..", "../10-ptp.conf", "20-ptp.conf", None, 7, {}])
def test_list_with_the_name_of_ours_is_its_owners(conf: ConfDir, mark: object) -> None:
    """The runtime uses it, and so do we; it is never taken for a list that we made."""
    (conf.path / "10-ptp.conf").write_text(SINGLE)
    path = conf.path / "10-ptp-tcpip-bypass.conflist"
    foreign = FLANNEL.replace("{", f'{{"tcpip-bypass/made-from": {json.dumps(mark)}, ', 1)
    path.write_text(foreign)
    for _ in range(2):
        assert conf.put_in(PLAIN).conflist == path
        assert "cbr0" in path.read_text()
    conf.take_out()
    assert files_in(conf.path) == {path.name: foreign.encode(), "10-ptp.conf": SINGLE.encode()}


def test_list_of_a_single_keeps_what_others_put_there(conf: ConfDir) -> None:
    """istio-cni would wait for ever for a file of that name that has gone."""
    (conf.path / "10-ptp.conf").write_text(SINGLE)
    done = conf.put_in(PLAIN)
    assert done.conflist is not None
    whole = json.loads(done.conflist.read_text())
    whole["plugins"].append({"type": "istio-cni", "name": "istio-cni"})
    done.conflist.write_text(json.dumps(whole, indent=2))  # as Go has it: a layout of its own
    for text in (SINGLE, "{", SINGLE):
        (conf.path / "10-ptp.conf").write_text(text)
        assert not conf.lacks(PLAIN)
        assert not conf.put_in(PLAIN).changed
    out = conf.take_out()
    assert out.problems == ()
    assert f"{done.conflist} stays" in out.left[0]
    left = json.loads(done.conflist.read_text())
    assert [plugin["type"] for plugin in left["plugins"]] == ["ptp", "istio-cni"]
    conf.put_in(PLAIN)
    assert has_entry(done.conflist)
    (conf.path / "10-ptp.conf").unlink()
    assert conf.take_out().left == ()
    assert files_in(conf.path) == {}


def test_list_of_the_first_edition_that_was_changed_stays(conf: ConfDir) -> None:
    as_list = conf.path / "10-ptp.conflist"
    (conf.path / "10-ptp.conf.tcpip-bypass").write_text(SINGLE)
    chain = json.loads(conflist.list_of_single(SINGLE, "10-ptp.conf"))
    chain["plugins"] += [{"type": "tcpip-bypass"}, {"type": "x"}]
    as_list.write_text(json.dumps(chain))
    assert conf.put_in(PLAIN).conflist == as_list
    conf.take_out()
    assert list(files_in(conf.path)) == [as_list.name]
    left = json.loads(as_list.read_text())
    assert [plugin["type"] for plugin in left["plugins"]] == ["ptp", "x"]


def test_lists_that_cilium_moved_aside_go(conf: ConfDir) -> None:
    path = conf.path / "10-ptp.conf"
    path.write_text(SINGLE)
    done = conf.put_in(PLAIN)
    assert done.conflist is not None
    for each in (path, done.conflist):
        each.rename(f"{each}.cilium_bak")
    conf.take_out()
    assert list(files_in(conf.path)) == ["10-ptp.conf.cilium_bak"]


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
