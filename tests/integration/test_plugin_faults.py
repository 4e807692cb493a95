# SPDX-License-Identifier: Apache-2.0
"""ADD and DEL broken off, or refused by the kernel, at every step they take.

strace makes the fault: it replaces one system call by an error, or kills the process as it
enters it. Which calls there are is read from an undisturbed run, so a step added to the plugin
is tested without being named here.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bed import open_bed
from tests.bed.bed import Bed
from tests.integration import plugin_calls
from tests.integration.plugin_calls import Answer, Sandbox

CALLS = "bpf,flock,getdents64,mkdir,newfstatat,openat,readlink,rename,unlink,write"
# What the kernel would say of: a full disk, a security module, something in use.
ERRORS = ("ENOSPC", "EPERM", "EBUSY")
KILL = "SIGKILL"
# Every error at every step takes two minutes; by default the errors take turns.
EVERY_FAULT = os.environ.get("PLUGIN_FAULTS") == "all"
RANDOM_KILLS = int(os.environ.get("PLUGIN_KILLS", "60"))


@dataclass(frozen=True)
class Step:
    """The ``ordinal``-th call of ``name`` in one run, counted from 1."""

    name: str
    ordinal: int
    text: str


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with open_bed() as made:
        yield made


@pytest.fixture(scope="module")
def pod(bed: Bed) -> Iterator[Sandbox]:
    with plugin_calls.sandbox(bed, "faults") as made:
        # Whatever is done once per configuration is done now.
        assert made.call("ADD").exit == 0
        assert made.call("DEL").exit == 0
        yield made


def strace(trace: Path, *options: str) -> list[str | Path]:
    return ["strace", "-f", "-qq", "-y", "-o", trace, "-e", f"trace={CALLS}", *options]


def steps(trace: Path, pod: Sandbox) -> list[Step]:
    """The calls on our folders, the pod's cgroup and namespace, and every bpf(2)."""
    ours = [str(pod.bed.folder), str(pod.cgroup), str(pod.netns.path)]
    counts: Counter[tuple[str, str]] = Counter()  # as strace counts: of each process
    found = []
    for line in trace.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match is None:
            continue
        process, name = match.groups()
        counts[process, name] += 1
        if name in {"bpf", "flock"} or any(path in line for path in ours):
            found.append(Step(name, counts[process, name], line))
    return found


def faults_for(found: list[Step]) -> list[tuple[Step, str]]:
    chosen = [
        (step, fault)
        for number, step in enumerate(found)
        for fault in (*(ERRORS if EVERY_FAULT else [ERRORS[number % len(ERRORS)]]), KILL)
    ]
    print(f"{len(found)} steps, {len(chosen)} faults")
    return chosen


def break_off(pod: Sandbox, command: str, step: Step, fault: str, trace: Path) -> Answer:
    """One call with ``fault`` in place of ``step``."""
    kind = "signal" if fault == KILL else "error"
    inject = f"inject={step.name}:{kind}={fault}:when={step.ordinal}"
    answer = pod.call(command, strace(trace, "-e", inject))
    if fault == KILL:
        assert answer.exit == (-signal.SIGKILL if command == "ADD" else 0), (step, answer)
    else:
        assert "(INJECTED)" in trace.read_text(encoding="utf-8", errors="replace"), step
    return answer


def check_recorded(pod: Sandbox) -> None:
    """Whatever is in the kernel, the state folder knows of it."""
    assert not pod.owners() or pod.recorded()


def clean_up(pod: Sandbox, turn: int) -> None:
    """As a runtime would go on, in one of three ways; each must end with nothing left."""
    if turn % 3 == 0:
        answer = pod.call("ADD")
        assert (answer.exit, answer.document) == (0, pod.result), answer
        assert pod.owners() == [pod.pod_id]
        pod.count_something()
    last = pod.call("GC" if turn % 3 == 1 else "DEL")
    assert (last.exit, last.stdout) == (0, ""), last
    assert pod.leftovers() == []


def test_add_at_every_step(pod: Sandbox, tmp_path: Path) -> None:
    """Refused: the pod starts all the same. Killed: no answer. Nothing stays unknown."""
    trace = tmp_path / "trace"
    assert pod.call("ADD", strace(trace)).exit == 0
    assert pod.call("DEL").exit == 0
    found = steps(trace, pod)
    assert {"bpf", "rename", "write", "flock"} <= {step.name for step in found}
    faults = faults_for(found)
    for turn, (step, fault) in enumerate(faults):
        answer = break_off(pod, "ADD", step, fault, trace)
        if fault != KILL:
            assert (answer.exit, answer.document) == (0, pod.result), (step, fault, answer)
        check_recorded(pod)
        clean_up(pod, turn)


def test_del_at_every_step(pod: Sandbox, tmp_path: Path) -> None:
    """Refused: DEL succeeds, and what it could not undo stays known. Killed: the same."""
    trace = tmp_path / "trace"
    assert pod.call("ADD").exit == 0
    pod.count_something()
    assert pod.call("DEL", strace(trace)).exit == 0
    found = steps(trace, pod)
    assert {"bpf", "unlink", "flock"} <= {step.name for step in found}
    faults = faults_for(found)
    for turn, (step, fault) in enumerate(faults):
        assert pod.call("ADD").exit == 0
        pod.count_something()
        answer = break_off(pod, "DEL", step, fault, trace)
        if fault != KILL:
            assert (answer.exit, answer.stdout) == (0, ""), (step, fault, answer)
            assert not pod.leftovers() or "left for GC" in answer.stderr, (step, fault, answer)
        check_recorded(pod)
        clean_up(pod, turn)


def test_killed_at_random(pod: Sandbox) -> None:
    """PLUGIN_KILLS times, ADD and DEL in turn, killed after a random part of its run."""
    seed = int(os.environ.get("PLUGIN_KILLS_SEED", str(random.randrange(2**32))))
    dice = random.Random(seed)
    started = time.monotonic()
    assert pod.call("ADD").exit == 0
    longest_s = time.monotonic() - started
    assert pod.call("DEL").exit == 0
    killed = 0
    for turn in itertools.count():
        if turn % 2:
            assert pod.call("ADD").exit == 0
            pod.count_something()
        process = pod.start("DEL" if turn % 2 else "ADD")
        time.sleep(dice.uniform(0, longest_s))
        process.kill()
        process.communicate()
        in_time = process.returncode == -signal.SIGKILL
        killed += in_time
        longest_s *= 1.02 if in_time else 0.97  # stay about the length of a call, however busy
        check_recorded(pod)
        clean_up(pod, turn // 2)
        if killed == RANDOM_KILLS:
            break
    print(f"{killed} kills in {turn + 1} calls, seed {seed}: leftovers 0")
