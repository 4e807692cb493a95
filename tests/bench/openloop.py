# SPDX-License-Identifier: Apache-2.0
"""Requests at a fixed rate, whatever the server does: openloop.c, run in the client's pod."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bed import wrk
from tests.bed.pod import Pod
from tests.bed.wrk import Load

SOURCE = Path(__file__).with_suffix(".c")
CONNECTIONS = 16
WARM_UP = 1_000  # requests, at 1,000 a second: some sixty exchanges a connection
ANSWER_TIMEOUT_S = 60


@dataclass(frozen=True)
class Rate:
    """What to ask for, how often, and for how many milliseconds after the warm-up."""

    path: str
    per_second: int
    measure_ms: int


@dataclass(frozen=True)
class Outcome:
    """Latencies count from when a request was due; `unanswered` had none a second later."""

    load: Load
    unanswered: int

    @property
    def answered(self) -> int:
        return self.load.requests - self.unanswered


@contextmanager
def warm(
    program: Path, pod: Pod, host: str, rate: Rate, cpu: str
) -> Iterator[Callable[[], Outcome]]:
    """The generator, connected and warm, and a call that lets it go on and gives what it saw.

    host: an IP address, or the path of a socket of AF_UNIX.

    Raises (the call does, too):
        RuntimeError: no connection, or an answer that was no success.
    """
    numbers = (rate.per_second, CONNECTIONS, WARM_UP, rate.measure_ms)
    process = pod.spawn(
        [program, host, "80", rate.path, *map(str, numbers)],
        cpus=cpu,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def go() -> Outcome:
        out, _ = process.communicate("go\n", timeout=ANSWER_TIMEOUT_S)
        if process.returncode != 0:
            raise RuntimeError(f"{program.name} in pod {pod.name} failed:\n{pod.logs()}")
        load, unanswered, unsuccessful = wrk.parse(out)
        if unsuccessful:
            raise RuntimeError(f"{unsuccessful} answers in pod {pod.name} that were no success")
        return Outcome(load, unanswered)

    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{program.name} in pod {pod.name} did not start:\n{pod.logs()}")
        yield go
    finally:
        process.kill()
        process.wait()
