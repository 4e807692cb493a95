# SPDX-License-Identifier: Apache-2.0
"""load, unload and the self-test when things are not as they left them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bpf import abi
from cni_plugin import names
from install.program import commands, freshness, report, selftest
from install.program.generations import Generations
from install.program.selftest import Check, Verdict
from tests.bed import cgroups, open_bed
from tests.bed.bed import Bed
from tests.bed.node import PROGRAM
from tests.integration import plugin_calls
from tests.integration.plugin_calls import Sandbox
from tests.integration.reach import in_process


@pytest.fixture
def bed() -> Iterator[Bed]:
    with open_bed() as made:
        yield made


@pytest.fixture
def pod(bed: Bed) -> Iterator[Sandbox]:
    with plugin_calls.sandbox(bed, "moved") as made:
        yield made


def must(pod: Sandbox, command: str) -> None:
    answer = pod.call(command)
    assert answer.exit == 0, answer


@pytest.mark.parametrize(("old", "new"), [("aaa-old", "zzz-new"), ("zzz-old", "aaa-new")])
def test_load_leaves_a_re_created_pod_to_its_new_sandbox(
    bed: Bed, pod: Sandbox, old: str, new: str
) -> None:
    before, after = pod.again(old), pod.again(new)
    must(before, "ADD")
    must(after, "ADD")
    bed.node.call("load")
    assert after.owners() == [after.pod_id]
    must(after, "CHECK")
    must(before, "DEL")
    assert after.owners() == [after.pod_id]
    must(after, "DEL")
    assert after.leftovers() == []


def test_load_and_unload_find_a_pod_whose_record_is_lost(bed: Bed, pod: Sandbox) -> None:
    must(pod, "ADD")
    shutil.rmtree(bed.node.state_dir / "attachments")
    bed.node.load()
    assert pod.owners() == [pod.pod_id]
    status = bed.node.status()
    assert (status["generation"], status["older_generations"]) == (2, [])
    bed.node.call("unload")
    assert pod.owners() == []


def test_unload_finds_a_pod_when_the_pins_are_gone(bed: Bed, pod: Sandbox) -> None:
    """As after `umount /sys/fs/bpf`: by the pod's record."""
    must(pod, "ADD")
    for generation in bed.node.bpffs.iterdir():
        if not generation.is_symlink():
            shutil.rmtree(generation)
    assert pod.owners() == [pod.pod_id]
    bed.node.call("unload")
    assert pod.owners() == []


def test_unload_removes_only_what_is_ours(bed: Bed, pod: Sandbox) -> None:
    must(pod, "ADD")
    stranger = bed.node.state_dir / "somebody-else's"
    stranger.write_text("data")
    (bed.node.bpffs / "next").symlink_to("gen-9")  # a load was killed here
    (bed.node.state_dir / "node.part").write_text("")
    (bed.node.bpffs / "gen-of-another").mkdir()
    bed.node.call("unload")
    left = {path.name for path in bed.node.state_dir.iterdir()}
    assert left - {*names.JOINER_LOGS} == {stranger.name}  # the joiner lives on, and may say so
    assert [path.name for path in bed.node.bpffs.iterdir()] == ["gen-of-another"]
    assert pod.owners() == []
    bed.node.call("unload")
    must(pod, "DEL")


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("mode", ["off", "proxy-only"])
def test_a_new_verdict_holds_for_running_pods_too(
    bed: Bed, pod: Sandbox, monkeypatch: pytest.MonkeyPatch, mode: str, forced: bool
) -> None:
    node_json = bed.node.state_dir / "node.json"
    node_json.write_text(json.dumps({**json.loads(node_json.read_text()), "mode": "full"}))
    conf = (("mode", "full" if forced else "auto"),)
    changed = Sandbox(**{**vars(pod), "conf": conf})
    must(changed, "ADD")
    verdict = Verdict(mode, ["a bug was found"], [])
    monkeypatch.setattr(selftest, "run", lambda **_: verdict)
    commands.load(in_process(bed))
    facts = report.facts(in_process(bed))
    if mode == "off" and not forced:
        assert changed.owners() == []
        assert (facts.attachments, facts.lost) == ([], frozenset())
    else:
        assert changed.owners() == [changed.pod_id]
        record = next(r for r in in_process(bed).attachments() if r.pod_id == changed.pod_id)
        assert bool(record.flags & abi.POD_PROXY_ONLY) == (not forced)
        must(changed, "CHECK")
    must(changed, "DEL")


def test_a_self_test_that_could_not_run_loads_once(
    bed: Bed, pod: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again alone. When it runs, the mode is its, and pods may bypass."""
    node, real = in_process(bed), selftest.run
    pod = Sandbox(**{**vars(pod), "conf": (("mode", "auto"),)})
    reasons = ["no memory", "no memory", "no cgroup"]

    def run(*, mends: bool) -> Verdict:
        if not reasons:
            return replace(real(mends=mends), is_mended=False)  # the kernel's, as it is
        text = f"load: {reasons.pop(0)}"
        return Verdict("off", [text], [Check("load", "", "", text, False)])

    monkeypatch.setattr(selftest, "run", run)
    numbers = []
    for said in ("no memory", "no memory", "no cgroup"):
        commands.load(node)
        found = f"the self-test could not be carried through: load: {said}"
        assert freshness.reason_to_load(node) == found
        numbers.append([each.number for each in Generations(node.bpffs).all()])
        must(pod, "ADD")
        assert pod.owners() == []
        must(pod, "DEL")
    commands.load(node)
    assert freshness.reason_to_load(node) is None
    numbers.append([each.number for each in Generations(node.bpffs).all()])
    assert numbers == 4 * [[2]]  # the bed has loaded before
    assert node.state.node_mode()[0] != "off"


def test_a_load_that_fails_leaves_no_generation(bed: Bed) -> None:
    before = bed.node.status()["generation"]
    node_json = bed.node.state_dir / "node.json"
    node_json.unlink()
    node_json.mkdir()  # nothing can be written over it
    with pytest.raises(RuntimeError, match=r"node\.json"):
        bed.node.load()
    assert [path.name for path in bed.node.bpffs.glob("gen-*")] == [f"gen-{before}"]


@pytest.mark.parametrize("lost", ["control", "sock_ops", "."])
def test_load_when_the_current_generation_is_damaged(bed: Bed, lost: str) -> None:
    damaged = bed.node.bpffs / (bed.node.bpffs / "current").readlink()
    for pin in sorted(damaged.iterdir()):
        if lost in (pin.name, "."):
            pin.unlink()
    if lost == ".":
        damaged.rmdir()
    bed.node.load()
    status = bed.node.status()
    assert (status["loaded"], status["older_generations"]) == (True, [])
    assert sorted(path.name for path in bed.node.bpffs.glob("gen-*")) == [
        f"gen-{status['generation']}"
    ]


def test_an_upgrade_from_a_version_that_can_only_be_paused_pauses_nothing_else(bed: Bed) -> None:
    """The first edition has no map `due`. Its sockets leave as they close, paused until then."""
    (bed.node.bpffs / "current" / "due").unlink()
    bed.node.load()
    current = Generations(bed.node.bpffs).current()
    assert current is not None
    assert current.flags() == 0


def test_a_killed_self_test_is_swept_up() -> None:
    mount = cgroups.mount_point()
    process = subprocess.Popen(
        [PROGRAM, "selftest"], stdout=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (left := scratch(mount, process.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    selftest.sweep()
    assert not left[0].exists()


def scratch(mount: Path, owner: int) -> list[Path]:
    """Scratch cgroups that are locked now, by the process `owner`."""
    found = []
    for folder in mount.glob(f"{selftest.SCRATCH_PREFIX}*"):
        try:
            fd = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another self-test's, which has ended
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if any(holds(owner, folder)):
                found.append(folder)
        finally:
            os.close(fd)
    return found


def holds(owner: int, folder: Path) -> Iterator[bool]:
    """Whether each of the process' open files is this folder."""
    for fd in Path(f"/proc/{owner}/fd").iterdir():
        try:
            yield fd.readlink() == folder
        except OSError:
            yield False


def test_a_joiner_ends_with_a_parent_that_ended_first(bed: Bed) -> None:
    """The agent was killed before its joiner could ask to be told of that."""
    folders = ["--bpffs", str(bed.node.bpffs), "--state-dir", str(bed.node.state_dir)]
    ended = subprocess.Popen(["true"])
    ended.wait()
    subprocess.run([PROGRAM, "join", "--parent", str(ended.pid), *folders], check=True, timeout=60)
