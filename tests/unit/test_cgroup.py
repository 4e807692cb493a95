# SPDX-License-Identifier: Apache-2.0
"""The names of pods' cgroups, in both drivers' spelling and every form a runtime may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from cni_plugin import cgroup

UID = "11d9f4de-5d0c-4e3e-9a10-000000000001"
SYSTEMD_UID = UID.replace("-", "_")

UNIFIED = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
)


@pytest.mark.parametrize(
    ("mountinfo", "expected"),
    [
        (UNIFIED, "/sys/fs/cgroup"),
        (HYBRID, "/sys/fs/cgroup/unified"),
        ("1 2 0:3 /kubepods /pods rw - cgroup2 none rw\n" + UNIFIED, "/sys/fs/cgroup"),
        (r"1 2 0:3 / /my\040cgroups rw master:1 - cgroup2 none rw", "/my cgroups"),
        ("1 2 0:3 / /my\u2028\vcgroups rw - cgroup2 none rw\n", "/my\u2028\vcgroups"),
        ("32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", None),
        ("", None),
        ("garbage\n - cgroup2 none rw\n", None),
    ],
)
def test_mount_point(mountinfo: str, expected: str | None) -> None:
    assert cgroup.mount_point(mountinfo) == (Path(expected) if expected else None)


@pytest.mark.parametrize(
    ("cgroup_path", "expected"),
    [
        (f"/kubepods/burstable/pod{UID}", [f"kubepods/burstable/pod{UID}"]),
        (f"kubepods//pod{UID}/", [f"kubepods/pod{UID}"]),
        (
            f"kubepods-burstable-pod{SYSTEMD_UID}.slice:cri-containerd:4f2ac1d0",
            [
                f"kubepods-burstable-pod{SYSTEMD_UID}.slice",
                "kubepods.slice/kubepods-burstable.slice/"
                f"kubepods-burstable-pod{SYSTEMD_UID}.slice",
            ],
        ),
        ("/", []),
        ("", []),
        (".", []),
        ("/kubepods/../../etc", []),
        ("/kubepods/./x", []),
        ("/kubepods/\0", []),
        ("/kubepods/\ud800", []),
    ],
)
def test_relative_paths(cgroup_path: str, expected: list[str]) -> None:
    assert cgroup.relative_paths(cgroup_path) == expected


LAYOUTS = [
    f"kubepods/pod{UID}",
    f"kubepods/besteffort/pod{UID}",
    f"kubepods.slice/kubepods-pod{SYSTEMD_UID}.slice",
    f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SYSTEMD_UID}.slice",
    f"kubelet/kubepods/guaranteed/pod{UID}",
    f"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{SYSTEMD_UID}.slice",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_search(tmp_path: Path, layout: str) -> None:
    other = "pod11d9f4de-5d0c-4e3e-9a10-000000000002"
    (tmp_path / "kubepods" / other / "container" / f"pod{UID}").mkdir(parents=True)
    (tmp_path / "system.slice" / "ssh.service").mkdir(parents=True)
    (tmp_path / layout / "container").mkdir(parents=True)
    assert cgroup.search(tmp_path, UID) == tmp_path / layout


def test_search_finds_no_pod_of_a_longer_uid(tmp_path: Path) -> None:
    (tmp_path / f"kubepods/pod{UID}").mkdir(parents=True)
    assert cgroup.search(tmp_path, UID[:-1]) is None
    assert cgroup.search(tmp_path, UID[1:]) is None


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the cgroup2 mount."""
    text = f"30 23 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw\n"
    monkeypatch.setattr(cgroup, "USUAL_PLACES", ())
    monkeypatch.setattr(cgroup, "mountinfo", lambda: text)
    return tmp_path


def test_the_root_in_its_usual_place_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, below, absent = (tmp_path / name for name in ("root", "below", "absent"))
    for folder, files in {root: ["controllers"], below: ["controllers", "type"]}.items():
        folder.mkdir()
        for name in files:
            (folder / f"cgroup.{name}").touch()
    monkeypatch.setattr(cgroup, "mountinfo", lambda: UNIFIED)
    monkeypatch.setattr(cgroup, "USUAL_PLACES", (absent, below, root))
    assert cgroup.find_mount() == root
    monkeypatch.setattr(cgroup, "USUAL_PLACES", (absent, below))
    assert cgroup.find_mount() == Path("/sys/fs/cgroup")


def test_find_by_path(mounted: Path) -> None:
    pod = mounted / f"kubepods/burstable/pod{UID}"
    pod.mkdir(parents=True)
    assert cgroup.find(f"/kubepods/burstable/pod{UID}", UID) == (pod, "")


def test_find_by_bare_slice(mounted: Path) -> None:
    pod = mounted / LAYOUTS[3]
    pod.mkdir(parents=True)
    assert cgroup.find(f"{pod.name}:cri-containerd:4f2a", UID) == (pod, "")


def test_find_by_uid_when_the_path_leads_nowhere(mounted: Path) -> None:
    pod = mounted / f"kubepods/pod{UID}"
    pod.mkdir(parents=True)
    for path in (None, "", "/gone/pod", 7, ["x"]):
        assert cgroup.find(path, UID) == (pod, "")


@pytest.mark.parametrize("uid", [UID, ""])
def test_a_cgroup_that_pods_share_is_not_taken(mounted: Path, uid: str) -> None:
    """Without a UID no cgroup can be told from such."""
    (mounted / "k8s.io").mkdir()
    found, why = cgroup.find("/k8s.io", uid)
    assert found is None
    assert "/k8s.io" in why
    assert repr(uid) in why


@pytest.mark.parametrize("uid", ["", "*", "../..", "pod", "\0", "a/b"])
def test_strange_uids_find_no_cgroup(mounted: Path, uid: str) -> None:
    (mounted / f"kubepods/pod{UID}").mkdir(parents=True)
    assert cgroup.find(None, uid)[0] is None


def test_without_cgroup2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "USUAL_PLACES", ())
    monkeypatch.setattr(cgroup, "mountinfo", lambda: "")
    assert cgroup.find("/kubepods/pod1", "1") == (None, "no cgroup2 file system is mounted")
