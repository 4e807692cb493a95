# SPDX-License-Identifier: Apache-2.0
"""How often the agent works, when others work against it."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from install.program.agent.schedule import NotDone, Task, Waiting


class Clock:
    """time.monotonic() of a test."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Node:
    """A file that another program rewrites at certain times, and a task that puts it right."""

    def __init__(self, rewrites: Iterable[float]) -> None:
        self.clock = Clock()
        self.right = False
        self.rewrites = sorted(rewrites)
        self.repairs: list[float] = []
        self.task = Task("file", self._keep, every_s=300, first_pause_s=0.25, longest_pause_s=60)

    def _keep(self) -> bool:
        if self.right:
            return True
        self.right = True
        self.repairs.append(self.clock.now)
        return False

    def live(self, until_s: float) -> None:
        """Time passes from event to event, as in the agent's loop."""
        while self.clock.now < until_s:
            following = [*self.rewrites[:1], self.task.due, until_s]
            self.clock.now = max(self.clock.now, min(following))
            if self.rewrites and self.rewrites[0] <= self.clock.now:
                self.rewrites.pop(0)
                self.right = False
                self.task.wake(self.clock.now, 0.1)
            elif self.task.due <= self.clock.now:
                self.task.run(self.clock)


def test_a_single_rewrite_is_repaired_at_once() -> None:
    node = Node([100])
    node.live(200)
    assert node.repairs == [0, pytest.approx(100.1)]


def test_fifty_rewrites_in_ten_seconds_cost_a_few_writes() -> None:
    node = Node([1 + number / 5 for number in range(50)])
    node.live(600)
    assert len(node.repairs) <= 8
    assert node.right
    assert node.repairs[-1] < 11 + 10  # as long again as the others took, at most


def test_an_endless_rewriter_gets_one_write_a_minute() -> None:
    node = Node(range(3600))
    node.live(3600)
    assert len(node.repairs) <= 60 + 9


def test_after_quiet_times_it_is_quick_again() -> None:
    node = Node([*(number / 5 for number in range(50)), 1000])
    node.live(2000)
    assert node.repairs[-1] == pytest.approx(1000.1)


def test_failures_are_told_once_and_tried_ever_later() -> None:
    clock, tries = Clock(), list[float]()

    def work() -> bool:
        tries.append(clock.now)
        raise NotDone("no bcc")

    task = Task("load", work, every_s=60, first_pause_s=5, longest_pause_s=600)
    told = [task.run(clock)]
    while clock.now < 3600:
        clock.now = task.due
        told.append(task.run(clock))
    assert [str(each) for each in told if each] == ["no bcc"]
    assert task.problem == "no bcc"
    assert tries[:4] == [0, 5, 15, 35]
    assert tries[-1] - tries[-2] == 600


def test_starting_over_does_not_wait_for_the_pause() -> None:
    clock = Clock()
    task = Task("pods", lambda: False, every_s=900, first_pause_s=50, longest_pause_s=300)
    task.run(clock)
    task.wake(1)
    assert task.due == 50
    task.start_over(1, 2)
    assert task.due == 3


def test_waiting_is_a_problem_but_no_trouble() -> None:
    clock = Clock()

    def work() -> bool:
        raise Waiting("no conflist yet")

    task = Task("file", work, every_s=300, first_pause_s=5, longest_pause_s=60)
    assert isinstance(task.run(clock), Waiting)
    assert (task.problem, task.due) == ("no conflist yet", 300)
    task.wake(1)
    assert task.due == 1


def test_an_unforeseen_error_does_not_end_the_agent() -> None:
    def work() -> bool:
        raise KeyError("runtimeConfig")

    task = Task("pods", work, every_s=300, first_pause_s=5, longest_pause_s=60)
    assert isinstance(task.run(Clock()), KeyError)
    assert task.problem == "KeyError: 'runtimeConfig'"


def test_a_wait_whose_end_is_not_seen_is_tried_again() -> None:
    clock = Clock()

    def work() -> bool:
        raise Waiting("no API server yet", is_seen=False)

    task = Task("ask", work, every_s=86_400, first_pause_s=5, longest_pause_s=600)
    assert isinstance(task.run(clock), Waiting)
    assert task.due == 5


def test_what_was_told_is_told_to_be_over_once() -> None:
    clock, problems = Clock(), ["no conflist", "no conflist", "", ""]

    def work() -> bool:
        if problem := problems.pop(0):
            raise NotDone(problem)
        return True

    task = Task("file", work, every_s=300, first_pause_s=5, longest_pause_s=60)
    said = []
    while problems:
        failure = task.run(clock)
        said.append((str(failure or ""), task.over))
    assert said == [("no conflist", ""), ("", ""), ("", "no conflist"), ("", "")]


def test_work_that_knows_when_there_will_be_more() -> None:
    """One look at that time and not before, and then as ever; a pause that is due comes first."""
    clock, more, calm = Clock(), [200.0, None, 20.0], [True, True, False]

    def work() -> bool:
        if (again_s := more.pop(0)) is not None:
            task.look_again(again_s)
        return calm.pop(0)

    task = Task("pods", work, every_s=900, first_pause_s=50, longest_pause_s=300)
    due = []
    while more:
        task.run(clock)
        due.append(task.due - clock.now)
        clock.now = task.due
    assert due == [200, 900, 50]
