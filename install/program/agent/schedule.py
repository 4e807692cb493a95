# SPDX-License-Identifier: Apache-2.0
"""When what is due: at once when something happens, later and later while it keeps going wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


class Waiting(Exception):
    """The work cannot be done yet and nothing is wrong with that; the message says for what.

    Something wakes the task when it can be; unless ``is_seen`` is false, then it is tried again.
    """

    def __init__(self, message: str, *, is_seen: bool = True) -> None:
        super().__init__(message)
        self.is_seen = is_seen


class NotDone(Exception):
    """The work did not succeed; the message says what to do."""


@dataclass
class Task:
    """One thing that is to be right on a node, looked at again and again.

    ``work`` returns whether it was right already, or raises. If it was not, the next look comes
    after a pause and not before. The pause doubles each time. It starts anew after a quiet as long
    as the longest pause. So a program that keeps undoing our work is not fought. Times are seconds
    of time.monotonic().
    """

    name: str
    work: Callable[[], bool]
    every_s: float
    first_pause_s: float
    longest_pause_s: float
    due: float = 0.0
    problem: str = ""  # why it is not right; empty when it is
    over: str = ""  # the problem that this look has found to be gone
    _not_before: float = 0.0
    _pause_s: float = 0.0
    _again_s: float | None = None

    def wake(self, now: float, delay_s: float = 0.0) -> None:
        """Look soon, because something has happened."""
        self.due = min(self.due, max(now + delay_s, self._not_before))

    def look_again(self, delay_s: float) -> None:
        """For the work: it knows that there will be more to do `delay_s` seconds from now."""
        self._again_s = delay_s

    def start_over(self, now: float, delay_s: float = 0.0) -> None:
        """Look soon, whatever went wrong until now: what it was about is no more."""
        self._not_before = self._pause_s = 0.0
        self.wake(now, delay_s)

    def run(self, now: Callable[[], float]) -> Exception | None:
        """Does the work; returns what went wrong, if that is another problem than last time."""
        before, self.problem, self.over = self.problem, "", ""
        self._again_s = None
        calm = True
        failure: Exception | None = None
        try:
            calm = self.work()
        except Waiting as waiting:
            self.problem, failure, calm = str(waiting), waiting, waiting.is_seen
        except Exception as error:  # whatever it is: the agent goes on, and tries again
            self.problem, failure = f"{type(error).__name__}: {error}", error
            if isinstance(error, NotDone):
                self.problem = str(error)
            calm = False
        self._plan(now(), calm=calm)
        if before and not self.problem:
            self.over = before
        return failure if self.problem != before else None

    def _plan(self, now: float, *, calm: bool) -> None:
        if not calm:
            self._pause_s = min(max(2 * self._pause_s, self.first_pause_s), self.longest_pause_s)
            self._not_before = now + self._pause_s
        elif now > self._not_before + self.longest_pause_s:
            self._pause_s = 0.0
        self.due = now + self.every_s if calm else self._not_before
        if self._again_s is not None:
            self.wake(now, self._again_s)
