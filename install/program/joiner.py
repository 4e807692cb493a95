# SPDX-License-Identifier: Apache-2.0
"""The joiner: begins a pass over a pod when what its connections miss is what a pass costs.

Without it everything goes on; only new connections stay on TCP. All passes together take at most a
fiftieth of a CPU. docs/architecture.md has the reasons.
"""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import json
import math
import os
import select
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from bpf import abi, bpfsys, pins
from cni_plugin import names
from install.program import canary, log, whole_file
from install.program.canary import Canary
from install.program.generations import Generation, Generations
from install.program.passes import MOST_LEFT, PassTimeout, Runner
from install.program.pods import attached_cgroups

SHARE = 0.02  # of a CPU, for all passes
BURST_NS = 50_000_000
# In debt it rests until it has earned so much: many times what it takes itself between two rests.
LEAST_CREDIT_NS = 5_000_000
EXCHANGE_NS = 4_000  # what an exchange over the bypass saves
LEAST_COST = 50
LOOK_S = 1.0  # how often for new generations, and for events that were lost
BEAT_S = 20.0  # how often, at least, its file is written: `check` looks how old that is
# How long a pod is left out after a pass that did not end, or failed: at first, and at most.
FIRST_HELD_S, HELD_S = 1.0, 60.0
FIRST_STEP_S, LONGEST_STEP_S = 0.005, 1.0
FORGET_S = 60.0  # how often pods that are no more are forgotten
RESCAN_S = 1.0  # how often, at most, all cgroups are looked at

_PINS = (pins.VISIT, pins.DUE, pins.BEAT)
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Bell:
    """The ring buffer in which programs say that a pass is due. Read through libbpf."""

    def __init__(self, map_fd: int) -> None:
        self._lib = ctypes.CDLL(ctypes.util.find_library("bpf") or "libbpf.so.1")
        self._lib.ring_buffer__new.restype = ctypes.c_void_p
        self._lib.ring_buffer__new.argtypes = [
            *(ctypes.c_int, _CALLBACK, ctypes.c_void_p, ctypes.c_void_p)
        ]
        for name in ("ring_buffer__consume", "ring_buffer__epoll_fd", "ring_buffer__free"):
            getattr(self._lib, name).argtypes = [ctypes.c_void_p]
        self._callback = _CALLBACK(lambda _context, _data, _size: 0)  # `due` has the rest
        self._ring = self._lib.ring_buffer__new(map_fd, self._callback, None, None)
        if not self._ring:
            raise OSError("libbpf could not open the ring buffer")
        self.fd: int = self._lib.ring_buffer__epoll_fd(self._ring)

    def drain(self) -> None:
        self._lib.ring_buffer__consume(self._ring)

    def close(self) -> None:
        self._lib.ring_buffer__free(self._ring)


@dataclass
class Opened:
    """A generation that the joiner serves."""

    generation: Generation
    visit: int
    due: int
    beat: int
    bell: Bell
    canary: Canary | None

    @staticmethod
    def of(generation: Generation) -> Opened:
        visit, due, beat = (bpfsys.obj_get(str(generation.folder / pin)) for pin in _PINS)
        with bpfsys.closing(bpfsys.obj_get(str(generation.folder / pins.BELL))) as bell:
            return Opened(generation, visit, due, beat, Bell(bell), Canary.of(generation))

    def show_life(self) -> None:
        """Tells the programs that there is a joiner; else all goes by TCP after 10 s."""
        now = time.monotonic_ns().to_bytes(8, sys.byteorder)
        bpfsys.map_update(self.beat, bytes(4), now)

    @property
    def is_well(self) -> bool:
        """Whether its sockets may stay; not when FIONREAD has become wrong for them."""
        return self.canary is None or self.canary.is_well

    def is_needed(self) -> bool:
        """Whether it is to be served even without its pins: sockets must leave."""
        return self.canary is not None and self.canary.has_sockets()

    def has_sockets(self) -> bool:
        try:
            return (self.canary or self.generation).has_sockets()
        except FileNotFoundError:  # a load has just removed it: it had none
            return False

    def pods(self) -> list[int]:
        """All that have an entry, pending or not."""
        return [int.from_bytes(key, sys.byteorder) for key in bpfsys.map_keys(self.due, 8)]

    def pending(self) -> dict[int, abi.Due]:
        """The pods whose pass is due."""
        found = {}
        for key in bpfsys.map_keys(self.due, 8):
            with contextlib.suppress(FileNotFoundError):
                raw = bpfsys.map_lookup(self.due, key, ctypes.sizeof(abi.Due))
                due = abi.Due.from_buffer_copy(raw)
                if due.pending:
                    found[int.from_bytes(key, sys.byteorder)] = due
        return found

    def begin(self, pod_id: int, cost: int, pending: int = 0) -> None:
        """Nothing missed, nothing pending: before a pass, so that what comes meanwhile counts."""
        key = pod_id.to_bytes(8, sys.byteorder)
        bpfsys.map_update(self.due, key, bytes(abi.Due(0, cost, pending, 0)))

    def forget(self, pod_id: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            bpfsys.map_delete(self.due, pod_id.to_bytes(8, sys.byteorder))

    def close(self) -> None:
        self.bell.close()
        if self.canary:
            self.canary.close()
        for fd in (self.visit, self.due, self.beat):
            os.close(fd)


@dataclass(frozen=True)
class Passes:
    """What the joiner has done since it began, as it leaves it in the state folder."""

    passes: int = 0
    cpu_ns: int = 0
    failed: int = 0
    left: int = 0  # passes that were left to themselves and have not ended

    @staticmethod
    def read(state_dir: Path) -> Passes:
        """Zeros when no joiner has run, or its file cannot be read."""
        try:
            return Passes(**json.loads((state_dir / names.JOINER_JSON).read_bytes()))
        except (OSError, ValueError, TypeError):
            return Passes()

    def write(self, state_dir: Path) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason not to join
            whole_file.write(state_dir / names.JOINER_JSON, json.dumps(asdict(self)))


def silent_s(state_dir: Path) -> float | None:
    """How long ago a joiner last wrote its file, in seconds; None when none has."""
    try:
        return time.time() - (state_dir / names.JOINER_JSON).stat().st_mtime
    except OSError:
        return None


@dataclass
class Step:
    """When the next pass over a pod may be that no waiting connection has earned: for the steps of
    sockets that leave. One whose reader rests may take for ever, so the pauses grow."""

    pause_s: float = FIRST_STEP_S
    not_before: float = 0.0
    held: bool = False  # the last pass did not end, or failed
    held_s: float = FIRST_HELD_S

    def left_s(self) -> float:
        return self.not_before - time.monotonic()

    def hold(self) -> None:
        """After a pass that did not end, or failed."""
        self.not_before += self.held_s
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
    done: Passes = Passes()
    _opened: dict[str, Opened] = field(default_factory=dict)
    _folders: dict[int, Path] = field(default_factory=dict)
    _steps: dict[tuple[Generation, int], Step] = field(default_factory=dict)  # by pod in each
    _costs: dict[int, int] = field(default_factory=dict)  # of a pass over a pod, in exchanges
    _scanned_at: float = 0.0
    _written_at: float = -math.inf
    _retiring: Step = field(default_factory=Step)
    _retired_at: dict[int, float] = field(default_factory=dict)  # by pod: not always the same ones
    _credit_ns: float = BURST_NS
    _counted_at: float = field(default_factory=time.monotonic)
    _own_ns: int = field(default_factory=time.process_time_ns)
    _forgot_at: float = field(default_factory=time.monotonic)
    _troubled: set[int] = field(default_factory=set)

    def run(self, stop: Callable[[], bool], wake: int | None = None) -> None:
        """Until ``stop`` says so; looked at when ``wake``, a file descriptor, can be read."""
        try:
            while not stop():
                before = self.done
                self._look_for_generations()
                self._look_at_canaries()
                wait_s = self._serve()
                self.done = replace(self.done, left=self.runner.left())
                is_silent = self._opened and time.monotonic() - self._written_at >= BEAT_S
                if self.done != before or is_silent:
                    self.done.write(self.state_dir)
                    self._written_at = time.monotonic()
                # With nothing to spend, what rings must wait: a look at all pods is not free.
                fds = [each.bell.fd for each in self._opened.values() if self._credit_ns > 0]
                select.select([*fds, *([] if wake is None else [wake])], [], [], wait_s)
                for each in self._opened.values():
                    each.bell.drain()
        finally:
            for each in self._opened.values():
                each.close()
            self._opened.clear()
            self.runner.close()

    def _look_for_generations(self) -> None:
        complete = {each.folder.name: each for each in Generations(self.bpffs).complete()}
        for name in [name for name in self._opened if name not in complete]:
            if not self._opened[name].is_needed():
                self._opened.pop(name).close()
                self.runner.close()  # the fork that runs passes has all that was open here
        for name, generation in complete.items():
            if name not in self._opened and generation.is_whole():
                with contextlib.suppress(FileNotFoundError):
                    self._opened[name] = Opened.of(generation)
                    # A joiner that was killed may have begun passes that did not come.
                    for pod_id in self._opened[name].pods():
                        self._opened[name].begin(pod_id, abi.FIRST_COST, pending=1)

    def _look_at_canaries(self) -> None:
        for each in self._opened.values():
            if each.canary:
                each.canary.look()

    def _serve(self) -> float:
        """Runs the passes that are due and affordable; returns how long to wait, in seconds."""
        self._earn()
        for each in self._opened.values():
            if self.runner.left() < MOST_LEFT:
                each.show_life()
        due = [
            (waiting, each, pod_id)
            for each in (self._opened.values() if self._credit_ns > 0 else ())  # a look costs, too
            for pod_id, waiting in each.pending().items()
        ]
        has_canary = any(each.canary for each in self._opened.values())
        wait_s = canary.LOOK_S if has_canary else LOOK_S
        for waiting, each, pod_id in sorted(due, key=self._last_pass):
            if self._credit_ns <= 0:
                break
            step = self._steps.setdefault((each.generation, pod_id), Step())
            is_step = waiting.missed < waiting.cost or step.held
            left_s = step.left_s()
            if is_step and left_s > 0:
                wait_s = min(wait_s, left_s)
                continue
            step.take(again=is_step)
            step.held = not self._pass(each, pod_id)
            if step.held:
                step.hold()
            else:
                step.held_s = FIRST_HELD_S
        self._retire()
        self._forget_gone()
        if self._credit_ns > 0:
            return wait_s
        return min(wait_s, (LEAST_CREDIT_NS - self._credit_ns) / 1e9 / SHARE)

    def _last_pass(self, due: tuple[abi.Due, Opened, int]) -> float:
        """When it may have had one, so that every pod has its turn."""
        step = self._steps.get((due[1].generation, due[2]))
        return step.not_before if step else 0.0

    def _earn(self) -> None:
        """What this process itself takes is paid like the passes."""
        now, own_ns = time.monotonic(), time.process_time_ns()
        self._credit_ns += (now - self._counted_at) * 1e9 * SHARE - (own_ns - self._own_ns)
        self._credit_ns = min(self._credit_ns, BURST_NS)
        self._counted_at, self._own_ns = now, own_ns

    def _forget_gone(self) -> None:
        """Pods that are no more. Those that are listed have connected, so a scan after that finds
        them while they have a cgroup."""
        if time.monotonic() - self._forgot_at < FORGET_S:
            return
        self._forgot_at = time.monotonic()
        listed = [(each, pod_id) for each in self._opened.values() for pod_id in each.pods()]
        self._scan()
        for each, pod_id in listed:
            if pod_id not in self._folders:
                self._forget(each, pod_id)

    def _forget(self, opened: Opened, pod_id: int) -> None:
        opened.forget(pod_id)
        self._costs.pop(pod_id, None)
        self._steps.pop((opened.generation, pod_id), None)
        self._retired_at.pop(pod_id, None)
        self._troubled.discard(pod_id)

    def _retire(self) -> None:
        """Old generations: what a load could not take out of them leaves when it can. So it does
        from one whose canary has found FIONREAD wrong."""
        if self._retiring.left_s() > 0:
            return
        current = Generations(self.bpffs).current()
        old = [
            each for each in self._opened.values() if each.generation != current or not each.is_well
        ]
        if not any(each.has_sockets() for each in old):
            return
        self._retiring.take(again=True)
        self._scan()
        for each in old:
            for pod_id in sorted(self._folders, key=lambda one: self._retired_at.get(one, 0.0)):
                if self._credit_ns > 0:
                    self._retired_at[pod_id] = time.monotonic()
                    self._pass(each, pod_id)

    def _pass(self, opened: Opened, pod_id: int) -> bool:
        """Whether it ended in time."""
        folder = self._folder(pod_id)
        if folder is None:
            return True
        cost = self._costs.get(pod_id, abi.FIRST_COST)
        opened.begin(pod_id, cost)
        try:
            spent_ns = self.runner.run(opened.visit, folder)
        except BlockingIOError:  # a load is at it: its passes are of another generation
            opened.begin(pod_id, cost, pending=1)
            return True
        except (PassTimeout, EOFError, OSError) as error:
            if pod_id not in self._troubled:
                log.warning("pass_failed", f"{folder}: {error}", cgroup=folder)
            self._troubled.add(pod_id)
            self.done = replace(self.done, failed=self.done.failed + 1)
            opened.begin(pod_id, cost, pending=1)
            return False
        self._troubled.discard(pod_id)
        self._credit_ns -= spent_ns
        self.done = replace(
            self.done, passes=self.done.passes + 1, cpu_ns=self.done.cpu_ns + spent_ns
        )
        self._costs[pod_id] = max(LEAST_COST, (3 * cost + spent_ns // EXCHANGE_NS) // 4)
        return True

    def _folder(self, pod_id: int) -> Path | None:
        """The pod's cgroup; None when it has none any more, or none has been seen yet."""
        found = self._folders.get(pod_id)
        if found is not None and found.exists():
            return found
        if time.monotonic() - self._scanned_at < RESCAN_S:
            return None
        self._scan()
        if pod_id not in self._folders:
            for each in self._opened.values():
                self._forget(each, pod_id)
        return self._folders.get(pod_id)

    def _scan(self) -> None:
        self._scanned_at = time.monotonic()
        ours = Generations(self.bpffs).program_ids()
        ours |= {each.canary.programs_id for each in self._opened.values() if each.canary}
        self._folders = {
            pod.record.id: pod.path for pod in attached_cgroups(ours) if pod.record is not None
        }
