# SPDX-License-Identifier: Apache-2.0
"""The joiner: begins a pass over a pod when what its connections miss is what a pass costs.

Without it everything goes on; only new connections stay on TCP. Joins and leaves together take at
most a fiftieth of a CPU, and so do passes for edges. docs/architecture.md has the reasons.
"""

from __future__ import annotations

import contextlib
import math
import select
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from bpf import abi
from cni_plugin import attachment, names
from cni_plugin.state import Attachment, State
from install.program import canary, log
from install.program.generations import Generation, Generations
from install.program.passes import Passes, PassTimeout, Runner
from install.program.pods import attached_cgroups, programs_of
from install.program.served import Served

SHARE = 0.02  # of a CPU, for all passes but those for edges, which have as much
BURST_NS = 50_000_000
# A spent budget rests until it has earned so much: many times what the joiner takes meanwhile.
LEAST_CREDIT_NS = 5_000_000
MOST_PAID_NS = 5_000_000  # of one pass
EXCHANGE_NS = 4_000  # what an exchange over the bypass saves
LEAST_COST = 50
LOOK_S = 1.0  # how often for new generations, and for events that were lost
BEAT_S = 20.0  # how often, at least, its file is written
HUNG_S = 60.0
# How long a pod is left out after a pass that did not end, or failed: at first, and at most.
FIRST_HELD_S, HELD_S = 1.0, 60.0
FIRST_STEP_S, LONGEST_STEP_S = 0.005, 1.0
BLOCKED_S = 10.0  # a load takes a pod's sockets out in less
FORGET_S = 60.0  # how often pods that are no more are forgotten


@dataclass
class Budget:
    """The CPU time that passes of one kind may take: SHARE of what passes, BURST_NS at once."""

    credit_ns: float = BURST_NS

    @property
    def is_spent(self) -> bool:
        return self.credit_ns <= 0

    def earn(self, elapsed_s: float) -> None:
        self.credit_ns = min(self.credit_ns + elapsed_s * 1e9 * SHARE, BURST_NS)

    def rest_s(self) -> float:
        """How long it earns until the next pass."""
        return (LEAST_CREDIT_NS - self.credit_ns) / 1e9 / SHARE if self.is_spent else 0.0

    def pay(self, cost_ns: int) -> None:
        """For a pass. What is above MOST_PAID_NS keeps its own pod waiting: Backoff.rest()."""
        self.credit_ns -= min(cost_ns, MOST_PAID_NS)


def is_hung(state_dir: Path, current: Generation | None) -> bool:
    """Whether a joiner that was started HUNG_S ago, or earlier, does nothing any more.

    It has neither written its file, which a full disk can prevent, nor told the programs that it
    runs.
    """
    try:
        silent_s = time.time() - (state_dir / names.JOINER_JSON).stat().st_mtime
    except FileNotFoundError:
        silent_s = math.inf
    if current is None:
        return False
    try:
        told_s = current.joiner_silent_s()
        if told_s is None:
            told_s = time.time() - current.folder.stat().st_ctime  # since it was loaded
    except OSError:
        return False
    # Less than nothing: the clock was set back.
    return not 0 <= silent_s <= HUNG_S and told_s > HUNG_S


@dataclass
class Backoff:
    """When a pod may have its next pass that no waiting connection has earned: for the steps of
    sockets that leave. One whose reader rests may take for ever, so the pauses grow."""

    pause_s: float = FIRST_STEP_S
    not_before: float = 0.0
    rests_until: float = 0.0  # also if it has been earned
    held: bool = False  # the last pass did not end, or failed
    held_s: float = FIRST_HELD_S

    def left_s(self, *, is_earned: bool = False) -> float:
        """How long until the pod may have its pass, in seconds."""
        until = self.rests_until if is_earned else max(self.not_before, self.rests_until)
        return until - time.monotonic()

    def rest(self, cost_ns: int) -> None:
        """After a pass: a pod with many files takes SHARE of a CPU, and keeps no other waiting."""
        rest_s = max(0, cost_ns - MOST_PAID_NS) / 1e9 / SHARE
        self.rests_until = time.monotonic() + min(rest_s, HELD_S)

    def hold(self) -> None:
        """After a pass that did not end, or failed."""
        self.not_before = time.monotonic() + self.held_s
        self.held_s = min(2 * self.held_s, HELD_S)

    def take(self, *, again: bool) -> None:
        self.pause_s = min(2 * self.pause_s, LONGEST_STEP_S) if again else FIRST_STEP_S
        self.not_before = time.monotonic() + self.pause_s


@dataclass
class Joiner:
    """Serves all generations of one node."""

    bpffs: Path
    state_dir: Path
    runner: Runner
    done: Passes = field(default_factory=Passes)
    _served: list[Served] = field(default_factory=list)
    _folders: dict[int, Path] = field(default_factory=dict)
    _backoffs: dict[tuple[int, int], Backoff] = field(default_factory=dict)  # by `due` and pod
    _joins: Budget = field(default_factory=Budget)  # and leaves, and what the joiner takes itself
    _edges: Budget = field(default_factory=Budget)
    _is_edge_late: bool = False  # a pass for one is due and has not been made
    _costs: dict[int, int] = field(default_factory=dict)  # of a pass over a pod, in exchanges
    _scanned_at: float = -math.inf
    _written_at: float = -math.inf
    _emptying: Backoff = field(default_factory=Backoff)
    _emptied_at: dict[int, float] = field(default_factory=dict)  # by pod: not always the same ones
    _counted_at: float = field(default_factory=time.monotonic)
    _own_ns: int = field(default_factory=time.process_time_ns)
    _forgot_at: float = field(default_factory=time.monotonic)
    _troubled: dict[int, str] = field(default_factory=dict)  # why its last pass failed, by pod
    _blocked_since: dict[int, float] = field(default_factory=dict)  # another process visits it

    def run(self, stop: Callable[[], bool], wake: int | None = None) -> None:
        """Until ``stop`` says so; looked at when ``wake``, a file descriptor, can be read."""
        try:
            while not stop():
                before = self.done
                self._look_for_generations()
                self._look_at_canaries()
                wait_s = self._serve()
                self.done = replace(self.done, hung=self.runner.count_hung())
                is_silent = self._served and time.monotonic() - self._written_at >= BEAT_S
                if self.done != before or is_silent:
                    self.done.write(self.state_dir)
                    self._written_at = time.monotonic()
                fds = [each.bell.fd for each in self._served]
                select.select([*fds, *([] if wake is None else [wake])], [], [], wait_s)
                for each in self._served:
                    each.bell.drain()
        finally:
            for each in self._served:
                each.close()
            self._served.clear()
            with contextlib.suppress(OSError):
                self.runner.hand_over()

    def _look_for_generations(self) -> None:
        for each in [each for each in self._served if not each.is_pinned()]:
            if not each.is_needed():
                self._served.remove(each)
                for key in [key for key in self._backoffs if key[0] == each.due]:
                    del self._backoffs[key]
                each.close()
                self.runner.close()  # the fork that runs passes has its bell mapped
        known = {each.generation for each in self._served if each.is_pinned()}
        for generation in Generations(self.bpffs).complete():
            if generation not in known and generation.is_whole():
                with contextlib.suppress(FileNotFoundError):
                    made = Served.of(generation)
                    self._served.append(made)
                    # A joiner that was killed may have begun passes that did not come.
                    for pod_id in made.pods():
                        made.begin(pod_id, abi.FIRST_COST, pending=1)
                    self._scan()

    def _look_at_canaries(self) -> None:
        for each in self._served:
            if each.canary:
                each.canary.look(State(str(self.state_dir)))

    def _serve(self) -> float:
        """Runs the passes that are due and affordable; returns how long to wait, in seconds."""
        self._earn()
        self._show_life()
        edges = [each.bell.take_edge() for each in self._served]
        due = [
            (waiting, each, pod_id)
            for each in (self._served if self._can_pay(any(edges)) else ())
            for pod_id, waiting in each.pending().items()
        ]
        self._is_edge_late = False
        has_canary = any(each.canary for each in self._served)
        wait_s = canary.LOOK_S if has_canary else LOOK_S
        for waiting, each, pod_id in sorted(due, key=self._last_pass):
            budget = self._edges if waiting.edge else self._joins
            backoff = self._backoff(each, pod_id)
            is_step = waiting.missed < waiting.cost or backoff.held
            left_s = budget.rest_s() or backoff.left_s(is_earned=not is_step)
            if left_s > 0:
                wait_s = min(wait_s, left_s)
                self._is_edge_late |= bool(waiting.edge)
                continue
            self._try_pass(each, pod_id, budget, again=is_step)
        self._empty_retired()
        self._forget_gone()
        return min(wait_s, self._joins.rest_s() or wait_s)

    def _show_life(self) -> None:
        """Not without a process for passes, which would stand in: readers rely on their edges."""
        if not self._served:
            return
        with contextlib.suppress(OSError):  # it could not be made: the next pass says so
            self.runner.prepare()
            for each in self._served:
                each.show_life()

    def _can_pay(self, has_edge: bool) -> bool:
        """Whether a look at all pods, which costs, too, may find a pass that can be paid."""
        return not self._joins.is_spent or self._is_edge_late or has_edge

    def _last_pass(self, due: tuple[abi.Due, Served, int]) -> float:
        """When it may have had one, so that every pod has its turn."""
        backoff = self._backoffs.get((due[1].due, due[2]))
        return backoff.not_before if backoff else 0.0

    def _earn(self) -> None:
        """What this process itself takes is paid like the passes."""
        now, own_ns = time.monotonic(), time.process_time_ns()
        self._joins.credit_ns -= own_ns - self._own_ns
        for budget in (self._joins, self._edges):
            budget.earn(now - self._counted_at)
        self._counted_at, self._own_ns = now, own_ns

    def _forget_gone(self) -> None:
        """Pods that are no more. Those that are listed have connected, so a scan after that finds
        them while they have a cgroup."""
        if time.monotonic() - self._forgot_at < FORGET_S:
            return
        self._forgot_at = time.monotonic()
        for pod_id in self._listed():
            self._folder(pod_id)
        owners = Counter(self._folders.values())  # a sandbox is made anew in its pod's cgroup
        doubted = {pod_id for pod_id, path in self._folders.items() if owners[path] > 1}
        doubted |= self._listed() - self._folders.keys()  # a record can be lost
        if doubted:
            self._scan()
        for pod_id in doubted - self._folders.keys():
            self._forget(pod_id)

    def _listed(self) -> set[int]:
        return {pod_id for each in self._served for pod_id in each.pods()}

    def _forget(self, pod_id: int) -> None:
        for each in self._served:
            each.forget(pod_id)
            self._backoffs.pop((each.due, pod_id), None)
        self._folders.pop(pod_id, None)
        self._costs.pop(pod_id, None)
        self._emptied_at.pop(pod_id, None)
        self._troubled.pop(pod_id, None)
        self._blocked_since.pop(pod_id, None)

    def _empty_retired(self) -> None:
        """Passes over old generations: what a load could not take out leaves when it can.

        So it does from a generation whose canary has found FIONREAD wrong.
        """
        if self._emptying.left_s() > 0 or self._joins.is_spent:
            return
        current = Generations(self.bpffs).current()
        old = [each for each in self._served if each.generation != current or not each.is_well]
        if not any(each.has_sockets() for each in old):
            return
        self._emptying.take(again=True)
        if time.monotonic() - self._scanned_at >= FORGET_S:  # a pass made others known
            self._scan()
        for each in old:
            for pod_id in sorted(self._folders, key=lambda one: self._emptied_at.get(one, 0.0)):
                if not (self._joins.is_spent or self._backoff(each, pod_id).left_s() > 0):
                    self._emptied_at[pod_id] = time.monotonic()
                    self._try_pass(each, pod_id, self._joins, again=True)

    def _try_pass(self, served: Served, pod_id: int, budget: Budget, *, again: bool) -> None:
        """One pass, and when the pod may have its next one that nothing has earned."""
        backoff = self._backoff(served, pod_id)
        backoff.take(again=again)
        backoff.held = not self._pass(served, pod_id, budget)
        if backoff.held:
            backoff.hold()
        else:
            backoff.held_s = FIRST_HELD_S

    def _pass(self, served: Served, pod_id: int, budget: Budget) -> bool:
        """Runs one; returns whether it ended in time. Not while the pod's cgroup is not known."""
        folder = self._folder(pod_id)
        if folder is None:
            return False
        self._show_life()  # the ones before may have taken long
        cost = self._costs.get(pod_id, abi.FIRST_COST)
        served.begin(pod_id, cost)
        try:
            cost_ns = self.runner.run(served.visits[0], folder)
        except (PassTimeout, EOFError, OSError) as error:
            self._put_off(served, pod_id, cost)
            if isinstance(error, BlockingIOError) and self._note_blocked(pod_id) < BLOCKED_S:
                return True  # a load is at it: its passes are of another generation
            if isinstance(error, PassTimeout):
                self._backoff(served, pod_id).rest(error.cost_ns)
            self._say_failed(pod_id, f"{folder}: {error}")
            return False
        self._blocked_since.pop(pod_id, None)
        if problem := self._troubled.pop(pod_id, ""):
            log.info("pass_recovered", f"this is over: {problem}", **self._named(pod_id))
        budget.pay(cost_ns)
        self._backoff(served, pod_id).rest(cost_ns)
        self.done = replace(
            self.done, passes=self.done.passes + 1, cpu_ns=self.done.cpu_ns + cost_ns
        )
        self._costs[pod_id] = max(LEAST_COST, (3 * cost + cost_ns // EXCHANGE_NS) // 4)
        return True

    def _backoff(self, served: Served, pod_id: int) -> Backoff:
        return self._backoffs.setdefault((served.due, pod_id), Backoff())

    def _note_blocked(self, pod_id: int) -> float:
        """Notes that another process visits a pod; returns for how long it has, in seconds.

        If that is long, it may be a pass that hangs, which an earlier joiner has begun.
        """
        now = time.monotonic()
        return now - self._blocked_since.setdefault(pod_id, now)

    def _say_failed(self, pod_id: int, problem: str) -> None:
        self.done = replace(self.done, failed=self.done.failed + 1)
        if pod_id not in self._troubled:
            self._troubled[pod_id] = problem
            log.warning("pass_failed", f"tried again: {problem}", **self._named(pod_id))

    def _put_off(self, served: Served, pod_id: int, cost: int) -> None:
        """A pass that did not come is due again. It may be for an edge: the visits did not tell."""
        served.begin(pod_id, cost, pending=1)
        self._is_edge_late = True

    def _named(self, pod_id: int) -> dict[str, str]:
        """The fields that say which pod it is; none when its record cannot be read."""
        return log.of(self._record(pod_id))

    def _record(self, pod_id: int) -> Attachment | None:
        state = State(str(self.state_dir))
        with contextlib.suppress(OSError):
            keys = state.keys()
            return next(
                (state.read(key) for key in keys if attachment.pod_id(*key) == pod_id), None
            )
        return None

    def _folder(self, pod_id: int) -> Path | None:
        """The pod's cgroup; None when it has none any more, or none is known yet.

        A new pod is known by its record: a look at all cgroups can cost what joins earn in 15 s.
        """
        known = self._folders.get(pod_id)
        if known is not None and known.exists():
            return known
        record = self._record(pod_id)
        with contextlib.suppress(OSError):
            if record is not None and programs_of(record):
                self._folders[pod_id] = Path(record.cgroup)
                return self._folders[pod_id]
        if known is not None:
            self._forget(pod_id)
        return None

    def _scan(self) -> None:
        self._scanned_at = time.monotonic()
        ours = Generations(self.bpffs).program_ids()
        ours |= {each.canary.programs_id for each in self._served if each.canary}
        self._folders = {
            pod.record.id: pod.path for pod in attached_cgroups(ours) if pod.record is not None
        }
