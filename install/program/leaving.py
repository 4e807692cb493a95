# SPDX-License-Identifier: Apache-2.0
"""Takes the sockets of a generation out of its sockhash, as `unload` and a new `load` do."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from bpf import bpfsys, pins
from install.program import log, passes
from install.program.generations import Generation, Generations, kept_open, kept_visit, opened
from install.program.passes import PassTimeout, Runner
from install.program.pods import attached_cgroups

PATIENCE_S = 5.0
_PAUSE_S = 0.01  # between passes: a socket leaves in three of them
_LONGEST_PAUSE_S, _KEEP_S = 1.0, 24 * 3600.0  # of a process that is left behind


def take_out_sockets(
    generation: Generation, folders: Iterable[Path], patience_s: float = PATIENCE_S
) -> bool:
    """Takes every socket out of the generation's sockhash; returns whether none is left.

    ``folders`` are the cgroups of the pods. A socket with unread bypassed bytes stays until its
    reader has read them, and one that no process has open (in flight between two) cannot leave.
    """
    generation.set_retired(True)
    if not generation.is_whole():  # the first edition's: its sockets leave as they close
        generation.set_paused(True)
        return not generation.has_sockets()
    deadline = time.monotonic() + patience_s
    pods, runner = list(folders), Runner()
    try:
        with opened(generation.folder / pins.VISIT) as visit:
            while generation.has_sockets():
                if time.monotonic() > deadline:
                    return False
                _visit_all(runner, visit, pods)
                time.sleep(_PAUSE_S)
    finally:
        runner.close()
    return True


def empty_all(generations: Iterable[Generation], folders: Iterable[Path]) -> list[Generation]:
    """The same for several; says which of them have not come to their end, and returns them."""
    pods, left = list(folders), []
    for generation in generations:
        if not take_out_sockets(generation, pods):
            left.append(generation)
            log.warning(
                "sockets_left",
                f"sockets of {generation.folder.name} have unread bypassed bytes, or cannot be"
                " reached; they go on by TCP",
                generation=generation.folder.name,
            )
    return left


Locked = Callable[[], AbstractContextManager[object]]


def stay_behind(generation: Generation, folders: Iterable[Path], locked: Locked) -> None:
    """Leave a process behind that goes on with the passes until its sockets have left.

    For generations whose pins are about to be removed. Readers that rest past the bound are given
    their new edge, and leave. It ends after a day at most, and removes pins that stayed for
    sockets, under the lock that ``locked`` takes.
    """
    if not generation.is_whole():
        return
    with ExitStack() as stack:
        visit, *visitor = kept_visit(stack, generation.folder)
        sockhash = kept_open(stack, generation.folder / pins.SOCKHASH)
        runner, pods = Runner(), list(folders)

        def visit_all() -> float | None:
            return None if bpfsys.map_is_empty(sockhash) else _visit_all(runner, visit, pods)

        child = os.fork()
        if not child:
            try:
                passes.leave_container()
                if not os.fork():
                    passes.detach(visit, sockhash, *visitor)
                    _go_on(runner, visit_all)
                    with locked():
                        _remove_empty(generation, sockhash)
                    passes.remove_cgroup(is_within=True)
            finally:
                os._exit(0)
        os.waitpid(child, 0)


def stand_in(bpffs: Path) -> None:
    """Go on with the passes of a joiner that has ended, until there is another one or no socket has
    joined: their readers get their edges, and leave."""
    passes.detach()
    generations, began, runner = Generations(bpffs), time.monotonic(), Runner()

    def visit_all() -> float | None:
        found = [each for each in generations.complete() if each.is_whole()]
        busy = [each for each in found if each.has_sockets()]
        if not busy or any(_is_served_since(each, began) for each in found):
            return None
        folders = [pod.path for pod in attached_cgroups(generations.program_ids())]
        spent_s = 0.0
        for each in busy:
            with opened(each.folder / pins.VISIT) as visit:
                spent_s += _visit_all(runner, visit, folders)
        return spent_s

    _go_on(runner, visit_all)
    passes.remove_cgroup(is_within=True)


def _is_served_since(generation: Generation, began: float) -> bool:
    silent_s = generation.joiner_silent_s()
    return silent_s is not None and silent_s < time.monotonic() - began


def _visit_all(runner: Runner, visit: int, folders: Iterable[Path]) -> float:
    """Returns the CPU time that the passes took, in seconds."""
    spent_ns = 0
    for folder in folders:
        try:
            spent_ns += runner.run(visit, folder)
        except PassTimeout as timeout:
            spent_ns += timeout.cost_ns
        except (EOFError, OSError):
            continue  # gone, or the joiner is at it
    return spent_ns / 1e9


def _go_on(runner: Runner, visit_all: Callable[[], float | None]) -> None:
    """Passes for _KEEP_S at most; a fiftieth of a CPU, as the joiner.

    ``visit_all`` returns the CPU time that they took, in seconds; None: no more are needed.
    """
    deadline, pause_s = time.monotonic() + _KEEP_S, _PAUSE_S
    with contextlib.suppress(OSError):
        runner.prepare()  # that is no part of a pass
    while time.monotonic() < deadline:
        began_s = time.process_time()
        try:
            spent_s = visit_all()
        except OSError:
            spent_s = 0.0  # a load or an unload is at it
        if spent_s is None:
            break
        spent_s += time.process_time() - began_s
        time.sleep(max(pause_s, 50 * spent_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    runner.close()


def _remove_empty(generation: Generation, sockhash: int) -> None:
    """What `unload` left for its sockets; not what a load has put under its name since."""
    with contextlib.suppress(OSError):
        is_its_own = generation.has_pinned(pins.SOCKHASH, sockhash)
        others = Generations(generation.folder.parent)
        if is_its_own and bpfsys.map_is_empty(sockhash) and others.current() != generation:
            generation.remove()
            others.root.rmdir()
