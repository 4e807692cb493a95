# SPDX-License-Identifier: Apache-2.0
"""Runs scenarios in child processes and compares what they saw."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final

from bpf.loader import Programs
from tests.light import LIMITS, LightPod, accelerated
from tests.semantics import scenarios
from tests.semantics.scenario import PATIENCE_S, SCENARIOS, Io, Scenario

__all__ = ["Finding", "Run", "Transcript", "run_all", "scenarios"]

# How the bytes go: plain TCP; by bypass; by TCP between sockets that sit in the sockhash, as
# while the operator has paused the bypass.
PLAIN, BYPASS, PAUSED = "plain TCP", "bypass", "paused"
DIRECTIONS: Final = ("client sends", "server sends")
TIMEOUT_S: Final = 40 + 10 * PATIENCE_S
GREETING_BYTES: Final = 2

Transcript = list[tuple[str, Any]]


@dataclass(frozen=True)
class Run:
    """What one scenario saw in one direction and mode."""

    scenario: str
    direction: str
    mode: str
    transcript: Transcript
    bypassed_bytes: int


@dataclass(frozen=True)
class Finding:
    """Where a scenario's transcripts differ from plain TCP's."""

    scenario: Scenario
    differences: list[Difference] = field(default_factory=list)

    @property
    def differs(self) -> bool:
        return bool(self.differences)


@dataclass(frozen=True)
class Difference:
    """One event that came out otherwise."""

    mode: str
    direction: str
    event: str
    plain: Any
    found: Any


def run_all(
    only: Iterable[str] = (), *, jobs: int = 4, programs: Programs | None = None
) -> tuple[list[Finding], list[Run]]:
    """Every scenario, or those named, in each mode and direction.

    `programs` replaces those that are bypassed with, for instance by a mutant.
    """
    wanted = [SCENARIOS[name] for name in (only or SCENARIOS)]
    with ExitStack() as stack:
        paused = Programs(LIMITS)
        stack.enter_context(accelerated(paused)).pause()
        loaded = {PLAIN: None, BYPASS: programs or Programs(LIMITS), PAUSED: paused}
        work = [
            (one, direction, mode, loaded[mode])
            for mode in loaded
            for one in wanted
            for direction in DIRECTIONS
        ]
        gc.freeze()  # the children share this process' memory: leave LLVM's pages alone
        with ThreadPoolExecutor(jobs) as pool:
            runs = list(pool.map(lambda arguments: run_one(*arguments), work))
    return [compare(one, [run for run in runs if run.scenario == one.name]) for one in wanted], runs


def run_one(
    one: Scenario,
    direction: str,
    mode: str,
    programs: Programs | None,
    timeout_s: float = TIMEOUT_S,
) -> Run:
    """One scenario, in a process of its own; its transcript tells of a hang or an exception."""
    upstream = direction == DIRECTIONS[0]
    if programs is None:
        return Run(one.name, direction, mode, in_child(one, upstream, None, timeout_s), 0)
    with accelerated(programs) as pod:
        transcript = in_child(one, upstream, pod, timeout_s)
        return Run(one.name, direction, mode, transcript, pod.total().bypassed_bytes)


def in_child(one: Scenario, upstream: bool, pod: LightPod | None, timeout_s: float) -> Transcript:
    """Forks, runs the scenario there, and collects its events until it ends or time is up."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(out)
            play(one, upstream, pod, into)
        finally:
            os._exit(0)
    os.close(into)
    try:
        lines, ended = until_closed(out, timeout_s)
        transcript: Transcript = [tuple(json.loads(line)) for line in lines]
        if not ended:
            transcript.append(("HANG", f"not done after {timeout_s:.0f} s"))
        return transcript
    finally:
        os.close(out)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def play(one: Scenario, upstream: bool, pod: LightPod | None, into: int) -> None:
    """The child's side."""
    os.setpgid(0, 0)
    os.set_inheritable(into, True)

    def emit(event: str, value: object) -> None:
        os.write(into, json.dumps([event, value]).encode() + b"\n")

    try:
        if pod:
            pod.enter()
        one.run(Io(upstream=upstream, emit=emit))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        emit("EXCEPTION", f"{error!r} in {where.name}, line {where.lineno}")


def until_closed(fd: int, timeout_s: float) -> tuple[list[str], bool]:
    """The lines written to a pipe, and whether its writer closed it in time."""
    data = b""
    deadline = time.monotonic() + timeout_s
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    while poller.poll(max(deadline - time.monotonic(), 0) * 1000):
        chunk = os.read(fd, 65_536)
        if not chunk:
            return data.decode().splitlines(), True
        data += chunk
    return data.decode().splitlines(), False


def compare(one: Scenario, runs: Sequence[Run]) -> Finding:
    """Each mode's transcript against plain TCP's in the same direction."""
    plain = {run.direction: run.transcript for run in runs if run.mode == PLAIN}
    finding = Finding(one)
    for run in runs:
        if run.mode == PLAIN:
            continue
        for expected, found in zip_longest(plain[run.direction], run.transcript):
            if expected != found:
                event = (expected or found)[0] if (expected or found) else ""
                said = found if found and found[0] != event else (found or ("", None))[1]
                finding.differences.append(
                    Difference(
                        run.mode, run.direction, event, expected[1] if expected else None, said
                    )
                )
    return finding


def troubles(runs: Iterable[Run]) -> list[str]:
    """What must not happen in any run, whatever the difference: hangs, exceptions, no bypass."""
    found = []
    for run in runs:
        where = f"{run.scenario} ({run.direction}, {run.mode})"
        for event, value in run.transcript:
            if event in {"HANG", "EXCEPTION"}:
                found.append(f"{where}: {event} {value}")
        if run.mode == BYPASS:
            real = run.bypassed_bytes >= GREETING_BYTES
            if SCENARIOS[run.scenario].bypassed not in {None, real}:
                found.append(f"{where}: {run.bypassed_bytes} bytes were bypassed")
        elif run.bypassed_bytes:
            found.append(f"{where}: {run.bypassed_bytes} bytes were bypassed")
    return found
