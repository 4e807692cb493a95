# SPDX-License-Identifier: Apache-2.0
"""The note that ADD leaves when a fault kept a pod from being accelerated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cni_plugin import names
from cni_plugin.state import Key, State
from tests.unit.cases import ROOT
from tests.unit.test_attachment import BLANK

KEY = Key("4f2ac1d0", "eth0")
RESULT = {"cniVersion": "1.1.0", "ips": [{"address": "10.22.0.7/16"}]}


@pytest.fixture
def state(tmp_path: Path) -> State:
    found = State(str(tmp_path / "state"))
    found.make()
    return found


def call(command: str, folder: Path, **conf: Any) -> subprocess.CompletedProcess[str]:
    """The plugin for a pod that has no cgroup, on a node with loaded programs."""
    bpffs = folder / "bpffs"
    bpffs.mkdir(exist_ok=True)
    if not (bpffs / "current").is_symlink():
        (bpffs / "current").symlink_to("gen-1")
    request = {
        **{"cniVersion": "1.1.0", "name": "pods", "type": names.PLUGIN, "mode": "full"},
        **{"bpffs": str(bpffs), "stateDir": str(folder / "state")},
        "runtimeConfig": {names.POD_ANNOTATIONS: {names.SIDECAR_STATUS: "{}"}},
        "prevResult": RESULT,
        **conf,
    }
    pod = "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-7d9;K8S_POD_UID=no-such-uid"
    return subprocess.run(
        [sys.executable, "-m", "cni_plugin"],
        env={
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": KEY.container_id,
            "CNI_IFNAME": KEY.ifname,
            "CNI_NETNS": "/no/such",
            "CNI_ARGS": pod,
            "CNI_PATH": "/no/such",
        },
        cwd=ROOT,
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )


def notes(state: State) -> list[Path]:
    return list((state.folder / names.FAILURES).glob("*"))


def test_add_that_finds_no_cgroup_leaves_a_note_until_del(state: State) -> None:
    done = call("ADD", state.folder.parent)
    assert (done.returncode, json.loads(done.stdout)) == (0, RESULT)
    (note,) = notes(state)
    found = json.loads(note.read_text())
    reason = found.pop("reason")
    assert found == {**KEY._asdict(), "namespace": "shop", "name": "cart-7d9"}
    assert reason.startswith("CgroupNotFound: no cgroup of the pod below ")
    assert f"warning: not accelerated: {reason}" in done.stderr
    assert state.keys() == [KEY]
    assert call("DEL", state.folder.parent, runtimeConfig={}).returncode == 0
    assert notes(state) == []
    assert state.keys() == []


def test_policy_and_a_node_without_programs_leave_no_note(state: State) -> None:
    assert "not accelerated" in call("ADD", state.folder.parent, mode="off").stderr
    assert "not accelerated" in call("ADD", state.folder.parent, bpffs="/no/such").stderr
    assert notes(state) == []


def test_no_note_where_there_is_no_state_folder(tmp_path: Path) -> None:
    done = call("ADD", tmp_path)
    assert (done.returncode, json.loads(done.stdout)) == (0, RESULT)
    assert not (tmp_path / "state").exists()


def test_a_note_that_cannot_be_left_does_not_fail_add(state: State) -> None:
    (state.folder / names.FAILURES).write_text("in the way")
    done = call("ADD", state.folder.parent)
    assert (done.returncode, json.loads(done.stdout)) == (0, RESULT)
    assert "CgroupNotFound" in done.stderr


def test_gc_removes_a_note(state: State) -> None:
    state.note_failure(KEY, "shop", "cart-7d9", "why")
    listed = {names.VALID_ATTACHMENTS: [{"containerID": "4f2ac1d0", "ifname": "eth0"}]}
    assert call("GC", state.folder.parent, **listed).returncode == 0
    assert len(notes(state)) == 1
    assert call("GC", state.folder.parent, **{names.VALID_ATTACHMENTS: []}).returncode == 0
    assert notes(state) == []


def test_an_attachment_that_is_made_after_all_ends_its_note(state: State) -> None:
    state.note_failure(Key("c", "eth0"), "shop", "cart-7d9", "why")
    state.write(BLANK)
    assert notes(state) == []
    assert state.keys() == [Key("c", "eth0")]


def test_a_note_is_for_root_alone(state: State) -> None:
    umask = os.umask(0)
    try:
        state.note_failure(KEY, "shop", "cart-7d9", "why")
    finally:
        os.umask(umask)
    assert (state.folder / names.FAILURES).stat().st_mode & 0o777 == 0o700
