# SPDX-License-Identifier: Apache-2.0
"""Runs scenarios in child processes and compares what they saw."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Final

from bpf import abi, bpfsys, pins
from bpf.loader import Programs
from tests.light import LIMITS, LightPod, accelerated
from tests.semantics import scenarios
from tests.semantics.scenario import LONG_S, PATIENCE_S, SCENARIOS, Io, Scenario

__all__ = ["Finding", "Run", "Transcript", "run_all", "scenarios"]


@dataclass(frozen=True)
class Mode:
    """How the bytes go, and between which kind of ends."""

    name: str
    is_blocking: bool = False


PLAIN, BYPASS = Mode("plain TCP"), Mode("bypass")
# By TCP between sockets that are in the sockhash, as while the operator has paused the bypass.
PAUSED = Mode("paused")
BLOCKING_PLAIN, BLOCKING = Mode("plain TCP", True), Mode("blocking ends", True)
MODES: Final = (PLAIN, BYPASS, PAUSED, BLOCKING_PLAIN, BLOCKING)
DIRECTIONS: Final = ("client sends", "server sends")
TIMEOUT_S: Final = 40 + 10 * PATIENCE_S
GREETING_BYTES: Final = 2

Transcript = list[tuple[str, Any]]


@dataclass(frozen=True)
class Run:
    """What one scenario saw in one direction and mode."""

    scenario: str
    direction: str
    mode: Mode
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

    mode: Mode
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
    programs = programs or Programs(LIMITS)
    programs.mend_fionread()  # where the kernel lets it: as on a node
    allow_paused_pods(programs)
    work = [
        (one, direction, mode, None if mode in {PLAIN, BLOCKING_PLAIN} else programs)
        for mode in MODES
        for one in wanted
        for direction in DIRECTIONS
    ]
    gc.freeze()  # the children share this process' memory: leave LLVM's pages alone
    with ThreadPoolExecutor(jobs) as pool:
        runs = list(pool.map(lambda arguments: run_one(*arguments), work))
    return [compare(one, [run for run in runs if run.scenario == one.name]) for one in wanted], runs


def allow_paused_pods(programs: Programs) -> None:
    """From now on pods may be paused one by one."""
    control = bytes(abi.Control(abi.CONTROL_PODS_PAUSED, 0))
    bpfsys.map_update(programs.fds[pins.CONTROL], bytes(4), control)


def pause(pod: LightPod, paused: bool) -> None:
    """Pauses this pod, or lets it go on."""
    paused_pods, key = pod.programs.fds[pins.PAUSED_PODS], pod.id.to_bytes(8, sys.byteorder)
    if paused:
        bpfsys.map_update(paused_pods, key, (1).to_bytes(4, sys.byteorder))
        return
    with suppress(FileNotFoundError):
        bpfsys.map_delete(paused_pods, key)


def run_one(
    one: Scenario,
    direction: str,
    mode: Mode,
    programs: Programs | None,
    timeout_s: float = TIMEOUT_S,
) -> Run:
    """One scenario, in a process of its own; its transcript tells of a hang or an exception."""
    upstream = direction == DIRECTIONS[0]
    if programs is None:
        return Run(one.name, direction, mode, in_child(one, upstream, mode, None, timeout_s), 0)
    with accelerated(programs) as pod:
        if mode == PAUSED:
            pause(pod, True)
        transcript = in_child(one, upstream, mode, pod, timeout_s)
        pause(pod, False)
        return Run(one.name, direction, mode, transcript, pod.total().bypassed_bytes)


def in_child(
    one: Scenario, upstream: bool, mode: Mode, pod: LightPod | None, timeout_s: float
) -> Transcript:
    """Forks, runs the scenario there, and collects its events until it ends or time is up."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(out)
            play(one, upstream, mode, pod, into)
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


def play(one: Scenario, upstream: bool, mode: Mode, pod: LightPod | None, into: int) -> None:
    """The child's side."""
    os.setpgid(0, 0)
    os.set_inheritable(into, True)

    def emit(event: str, value: object) -> None:
        os.write(into, json.dumps([event, value]).encode() + b"\n")

    def until_joined(sockets: int) -> None:
        if pod and mode == BYPASS:
            pod.until_joined(sockets)
        elif pod and mode == PAUSED:  # a paused pod's sockets do not join
            pause(pod, False)
            pod.until_joined(sockets)
            pause(pod, True)

    # A socket with a time-out is O_NONBLOCK, and Python polls before each call, as an event loop.
    socket.setdefaulttimeout(None if mode.is_blocking else LONG_S)
    try:
        if pod:
            pod.enter()
        waits = until_joined if one.bypassed else None
        one.run(Io(upstream=upstream, emit=emit, until_joined=waits))
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
    """Each mode's transcript against plain TCP's of the same ends in the same direction."""
    plain = {
        (run.direction, run.mode.is_blocking): run.transcript
        for run in runs
        if run.mode in {PLAIN, BLOCKING_PLAIN}
    }
    finding = Finding(one)
    for run in runs:
        transcript = plain[run.direction, run.mode.is_blocking]
        for expected, found in zip_longest(transcript, run.transcript):
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
        kind = "blocking ends" if run.mode.is_blocking else "event loops"
        where = f"{run.scenario} ({run.direction}, {kind}, {run.mode.name})"
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
