# SPDX-License-Identifier: Apache-2.0
"""The joiner keeps its own house: pods that are no more, and what it costs itself."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpf import abi
from cni_plugin import attachment
from cni_plugin.state import Key, State
from install.program import joiner, log, passes
from install.program.generations import Generation, Generations
from install.program.joiner import (
    BLOCKED_S,
    BURST_NS,
    FIRST_HELD_S,
    FORGET_S,
    HELD_S,
    MOST_PAID_NS,
    SHARE,
    Joiner,
)
from install.program.lock import FolderLock
from install.program.passes import PassTimeout, Runner
from install.program.served import Served
from tests.unit.test_attachment import BLANK


class FakeServed:
    """A generation with these pods in its map `due`, none of them pending."""

    generation: Generation | None = None
    canary = None
    pinned = True
    due = 0
    bell = SimpleNamespace(take_edge=lambda: False)
    is_well = True

    def __init__(self, *pods: int) -> None:
        self.left = list(pods)
        self.rung: list[int] = []
        self.beats = 0
        self.visits = (0,)
        self.needed = True

    def pods(self) -> list[int]:
        return self.left

    def pending(self) -> dict[int, Any]:
        return {}

    def forget(self, pod_id: int) -> None:
        self.left = [each for each in self.left if each != pod_id]

    def show_life(self) -> None:
        self.beats += 1

    def has_sockets(self) -> bool:
        return True

    def is_pinned(self) -> bool:
        return self.pinned

    def is_needed(self) -> bool:
        return self.needed

    def close(self) -> None:
        self.needed = False

    def begin(self, pod_id: int, _cost: int, pending: int = 0) -> None:
        self.rung = [pod_id] if pending else []


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Joiner:
    """A joiner on a node where pod 1 is the only one."""
    pod = SimpleNamespace(record=SimpleNamespace(id=1), path=tmp_path)
    monkeypatch.setattr(joiner, "attached_cgroups", lambda _ours: [pod])
    made = Joiner(tmp_path, tmp_path, Runner())
    made._scan()
    return made


def visited_by_another(_visit: int, _folder: Path) -> int:
    """A pass over a pod that another process is at."""
    raise BlockingIOError


def test_pods_that_are_no_more_are_forgotten(made: Joiner) -> None:
    served = FakeServed(1, 2, 3)
    made._served.append(served)  # type: ignore[arg-type]
    made._serve()
    assert (served.left, served.beats) == ([1, 2, 3], 1)
    made._forgot_at -= FORGET_S
    made._serve()
    assert served.left == [1]


def test_a_pod_whose_cgroup_has_another_owner_is_forgotten(made: Joiner) -> None:
    """A sandbox was made anew in the pod's cgroup."""
    served = FakeServed(1, 2)
    made._served.append(served)  # type: ignore[arg-type]
    made._folders[2] = made._folders[1]
    made._forgot_at -= FORGET_S
    made._serve()
    assert served.left == [1]


def test_a_pod_whose_cgroup_is_not_known_is_held(made: Joiner) -> None:
    served: Any = FakeServed(3)
    made._try_pass(served, 3, made._joins, again=False)
    assert made._backoff(served, 3).held
    assert made._backoff(served, 3).left_s() > FIRST_HELD_S / 2


def test_a_new_pod_is_found_by_its_record(made: Joiner, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at every cgroup of a large node costs what joins earn in many seconds."""
    scans: list[object] = []

    def scan(ours: set[int]) -> list[object]:
        scans.append(ours)
        return []

    monkeypatch.setattr(joiner, "attached_cgroups", scan)
    monkeypatch.setattr(joiner, "programs_of", lambda record: [record.prog_id])
    ours = State(str(made.state_dir))
    ours.make()
    folder = made.state_dir / "pod"
    folder.mkdir()
    pod, absent = attachment.pod_id("c", "eth0"), attachment.pod_id("d", "eth0")
    ours.write(BLANK._replace(cgroup=str(folder), pod_id=pod))
    assert (made._folder(pod), made._folder(absent)) == (folder, None)
    ours.remove(Key("c", "eth0"))
    folder.rmdir()
    served = FakeServed(pod)
    made._served.append(served)  # type: ignore[arg-type]
    made._forgot_at -= FORGET_S
    made._serve()
    assert (served.left, scans) == ([], [])


def test_what_the_joiner_takes_itself_is_paid(made: Joiner) -> None:
    began_at, own_ns = made._counted_at, made._own_ns
    until = time.process_time() + 0.02
    while time.process_time() < until:
        pass
    made._earn()
    earned_ns = (made._counted_at - began_at) * 1e9 * SHARE
    assert made._own_ns - own_ns >= 20_000_000
    paid_ns = made._own_ns - own_ns
    assert made._joins.credit_ns == pytest.approx(min(BURST_NS - paid_ns + earned_ns, BURST_NS))


def test_a_pod_that_another_process_visits_has_its_turn_later(
    made: Joiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made.runner, "run", visited_by_another)
    served: Any = FakeServed(1)
    assert made._pass(served, 1, made._joins)
    assert (served.rung, made.done.failed) == ([1], 0)


@pytest.mark.parametrize("is_well", [True, False])
def test_sockets_leave_where_fionread_has_become_wrong(
    made: Joiner, monkeypatch: pytest.MonkeyPatch, is_well: bool
) -> None:
    visited = []

    def run(visit: int, folder: Path) -> int:
        visited.append((visit, folder))
        return 0

    monkeypatch.setattr(made.runner, "run", run)
    served: Any = FakeServed(1)
    served.is_well = is_well
    made._served.append(served)
    made._empty_retired()
    assert bool(visited) is not is_well


def test_sockets_of_old_generations_leave_on_the_budget(
    made: Joiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at every cgroup of a large node can cost more than a second earns."""
    scans: list[set[int]] = []

    def scan(ours: set[int]) -> list[object]:
        scans.append(ours)
        return [SimpleNamespace(record=SimpleNamespace(id=1), path=made.state_dir)]

    monkeypatch.setattr(joiner, "attached_cgroups", scan)
    monkeypatch.setattr(made.runner, "run", lambda *_: 0)
    served: Any = FakeServed(1)
    served.is_well = False
    made._served.append(served)
    made._scanned_at = -math.inf
    for _ in range(3):
        made._empty_retired()
        made._emptying.not_before = 0.0
    assert len(scans) == 1
    made._scanned_at = -math.inf
    made._joins.credit_ns = 0
    made._empty_retired()
    assert len(scans) == 1


LEADERLESS = """
import ctypes, platform, socket, threading, time
opened = socket.socket()
threading.Thread(target=time.sleep, args=(60,)).start()
print(opened.fileno(), flush=True)
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)  # exit(2)
"""


def test_an_edge_reaches_a_process_whose_main_thread_has_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", LEADERLESS], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        fd = int(process.stdout.readline())
        deadline = time.monotonic() + 10
        while ") Z" not in Path(f"/proc/{process.pid}/stat").read_text():
            assert time.monotonic() < deadline
        passes.wake_reader(process.pid, fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            passes.wake_reader(process.pid, fd + 1)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("mark", "writes"), [(1, [1]), (5, [])])
def test_an_edge_leaves_a_socket_with_a_mark_of_its_own_alone(
    monkeypatch: pytest.MonkeyPatch, mark: int, writes: list[int]
) -> None:
    """The file's number is another socket's by now: what it sets meanwhile must stand."""
    written: list[int] = []
    copy = SimpleNamespace(
        getsockopt=lambda *_: mark, setsockopt=lambda *option: written.append(option[-1])
    )
    monkeypatch.setattr(passes, "_copied", lambda *_: nullcontext(copy))
    passes.wake_reader(1, 2)
    assert written == writes


def test_a_generation_whose_pins_are_gone_is_served_while_sockets_must_leave(made: Joiner) -> None:
    served: Any = FakeServed(1)
    made._served.append(served)
    served.pinned = False
    made._look_for_generations()
    assert made._served == [served]
    served.needed = False
    made._look_for_generations()
    assert made._served == []


def test_a_later_generation_of_the_same_name_is_another_one(
    made: Joiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: Any = FakeServed(1)
    second: Any = FakeServed(1)
    generation = Generation(made.bpffs / "gen-1")
    first.generation = second.generation = generation
    made._served.append(first)
    monkeypatch.setattr(Generations, "complete", lambda _: [generation])
    monkeypatch.setattr(Generation, "is_whole", lambda _: True)
    monkeypatch.setattr(Served, "of", lambda _: second)
    made._look_for_generations()
    assert made._served == [first]
    first.pinned = False  # the bpffs was unmounted; a load has made the second one
    made._look_for_generations()
    assert made._served == [first, second]
    made._look_for_generations()
    assert (made._served, second.rung) == ([first, second], [1])


def test_a_pass_that_fails_is_said_once_and_said_to_be_over(
    made: Joiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    answers: list[OSError | int] = [OSError(5, "broken"), OSError(5, "broken"), 7, 7]

    def run(_visit: int, _folder: Path) -> int:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    for level in ("info", "warning"):
        monkeypatch.setattr(log, level, lambda event, *_text, **_about: said.append(event))
    monkeypatch.setattr(made.runner, "run", run)
    served: Any = FakeServed(1)
    assert [made._pass(served, 1, made._joins) for _ in range(4)] == [False, False, True, True]
    assert said == ["pass_failed", "pass_recovered"]


def test_a_joiner_in_debt_comes_to_its_passes(
    made: Joiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though what it takes itself, between two rests, is more than it earns in a short one."""
    now_s, own_ns = made._counted_at, made._own_ns
    passes = []

    def run(_visit: int, folder: Path) -> int:
        passes.append(folder)
        return 100_000

    monkeypatch.setattr("install.program.joiner.time.monotonic", lambda: now_s)
    monkeypatch.setattr("install.program.joiner.time.process_time_ns", lambda: own_ns)
    monkeypatch.setattr(made.runner, "run", run)
    served: Any = FakeServed(1)

    def pending() -> dict[int, abi.Due]:
        nonlocal own_ns
        own_ns += 8_000_000  # many pods
        return {1: abi.Due(missed=1_000, cost=100, pending=1)}

    served.pending = pending
    made._served.append(served)
    made._joins.credit_ns = -1_000_000.0
    for _ in range(20):
        own_ns += 1_000_000
        now_s += made._serve()
    assert len(passes) > 5


@pytest.mark.parametrize("spent", ["", "joins", "edges"])
def test_edges_and_joins_wait_for_their_own_budget(
    made: Joiner, monkeypatch: pytest.MonkeyPatch, spent: str
) -> None:
    passes = []

    def run(_visit: int, folder: Path) -> int:
        passes.append(int(folder.name))
        return 1_000_000

    now_s, own_ns = made._counted_at, made._own_ns
    monkeypatch.setattr("install.program.joiner.time.monotonic", lambda: now_s)
    monkeypatch.setattr("install.program.joiner.time.process_time_ns", lambda: own_ns)
    monkeypatch.setattr(made.runner, "run", run)
    folders = {pod_id: made.state_dir / str(pod_id) for pod_id in range(1, 5)}
    monkeypatch.setattr(made, "_folder", folders.get)
    served: Any = FakeServed(*folders)
    waiting = {pod_id: abi.Due(1_000, 100, pending=1, edge=pod_id == 3) for pod_id in folders}
    served.pending = lambda: waiting
    heard = [True, False]
    served.bell = SimpleNamespace(take_edge=heard.pop)
    made._served.append(served)
    if spent:
        getattr(made, f"_{spent}").credit_ns = -BURST_NS
    made._serve()
    assert passes == {"": [1, 2, 3, 4], "joins": [], "edges": [1, 2, 4]}[spent]
    wait_s = made._serve()  # now an edge has been asked for
    assert passes[-1] == {"": 4, "joins": 3, "edges": 4}[spent]
    assert (made._is_edge_late, wait_s > 1) == (spent == "edges", False)


def test_a_pass_for_an_edge_that_did_not_come_is_tried_again_in_debt(
    made: Joiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made.runner, "run", visited_by_another)
    made._joins.credit_ns = -BURST_NS
    assert not made._can_pay(False)
    made._pass(FakeServed(1), 1, made._edges)  # type: ignore[arg-type]
    assert made._can_pay(False)


@pytest.mark.parametrize("cost_ns", [2_000_000, 200_000_000])
def test_a_pod_with_many_files_keeps_no_other_waiting(
    made: Joiner, monkeypatch: pytest.MonkeyPatch, cost_ns: int
) -> None:
    """It pays by its own pause, whatever it has earned."""
    now_s, own_ns = made._counted_at, made._own_ns
    passes = []

    def run(_visit: int, folder: Path) -> int:
        passes.append(int(folder.name))
        return cost_ns if folder.name == "1" else 1_000_000

    monkeypatch.setattr("install.program.joiner.time.monotonic", lambda: now_s)
    monkeypatch.setattr("install.program.joiner.time.process_time_ns", lambda: own_ns)
    monkeypatch.setattr(made.runner, "run", run)
    folders = {pod_id: made.state_dir / str(pod_id) for pod_id in (1, 2)}
    monkeypatch.setattr(made, "_folder", folders.get)
    served: Any = FakeServed(*folders)
    served.pending = lambda: {pod: abi.Due(1_000, 100, pending=1) for pod in folders}
    made._served.append(served)
    for _ in range(40):
        made._serve()
        now_s += 0.25
    rest_s = max(0, cost_ns - MOST_PAID_NS) / 1e9 / SHARE
    assert passes.count(1) == (40 if not rest_s else 2)
    assert passes.count(2) == 40


def test_a_pass_that_took_long_is_paid_when_it_has_ended(
    made: Joiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object) -> int:
        raise PassTimeout("it took long", cost_ns=10_000_000_000)

    monkeypatch.setattr(made.runner, "run", run)
    served: Any = FakeServed(1)
    assert not made._pass(served, 1, made._joins)
    assert made._backoff(served, 1).left_s(is_earned=True) == pytest.approx(HELD_S, rel=0.01)


def test_a_pod_whose_pass_hangs_keeps_no_other_from_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here five of them, each held for as long as another process has a lock."""
    gate, hung = tmp_path / "gate", [tmp_path / str(number) for number in range(5)]
    gate.touch()
    well = tmp_path / "well"
    for folder in (*hung, well):
        folder.mkdir()

    def visit(_visit: int, folder: Path) -> None:
        with gate.open() as file:
            if folder != well:
                fcntl.flock(file, fcntl.LOCK_EX)
                until = time.process_time() + 0.05
                while time.process_time() < until:
                    pass

    monkeypatch.setattr(passes, "visit_pod", visit)
    monkeypatch.setattr(passes, "PATIENCE_S", 0.2)
    monkeypatch.setattr(passes, "leave_container", lambda: None)
    runner = Runner()
    with gate.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for folder in (*hung, hung[0]):
            with pytest.raises(PassTimeout) as found:
                runner.run(0, folder)
            assert found.value.cost_ns == 0
            assert runner.run(0, well) >= 0
        assert runner.count_hung() == len(hung)
        fcntl.flock(file, fcntl.LOCK_UN)  # they have inherited it
    deadline = time.monotonic() + 10
    while not (found.value.cost_ns >= 50_000_000):
        assert time.monotonic() < deadline
        with pytest.raises(PassTimeout) as found:
            runner.run(0, hung[0])
    monkeypatch.setattr(passes, "PATIENCE_S", 10)
    assert runner.run(0, hung[0]) >= 50_000_000
    runner.close()


def test_a_process_that_hangs_in_a_pass_keeps_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = os.pipe()
    monkeypatch.setattr(passes, "visit_pod", lambda *_: os.read(ends[0], 1))
    monkeypatch.setattr(passes, "PATIENCE_S", 0.1)
    monkeypatch.setattr(passes, "leave_container", lambda: None)
    state, runner = State(str(tmp_path)), Runner()
    state.make()
    folder, other = (FolderLock(tmp_path / "folder") for _ in range(2))
    assert folder.take()
    with state.locked(0), pytest.raises(PassTimeout):
        runner.run(ends[0], tmp_path)
    folder.release()
    try:
        with state.locked(0):
            assert other.take()
            other.release()
    finally:
        os.write(ends[1], b"x")
        runner.close()


def test_a_process_for_passes_that_was_killed_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "leave_container", lambda: None)
    monkeypatch.setattr(passes, "visit_pod", lambda *_: None)
    runner = Runner()
    runner.run(0, tmp_path)
    worker = runner._worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    runner.run(0, tmp_path)
    runner.close()


def test_a_pod_that_another_process_visits_for_long_is_said(
    made: Joiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made.runner, "run", visited_by_another)
    served: Any = FakeServed(1)
    assert made._pass(served, 1, made._joins)
    made._blocked_since[1] -= BLOCKED_S
    assert not made._pass(served, 1, made._joins)
    assert (served.rung, made.done.failed) == ([1], 1)


def test_a_failed_pass_leaves_a_process_that_can_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "leave_container", lambda: None)
    stood_in = tmp_path / "stood in"
    runner = Runner(stood_in.touch)
    with pytest.raises(FileNotFoundError):
        runner.run(0, tmp_path / "gone")
    assert runner._worker is not None
    runner.hand_over()
    deadline = time.monotonic() + 10
    while not stood_in.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_generation_that_is_removed_meanwhile_has_no_sockets(tmp_path: Path) -> None:
    served: Any = SimpleNamespace(canary=None, generation=Generation(tmp_path / "gen-1"))
    assert not Served.has_sockets(served)
