# SPDX-License-Identifier: Apache-2.0
"""What a pass costs: CPU time of this process, over processes of many kinds."""

from __future__ import annotations

import functools
import os
import resource
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.light import LightPod, accelerated

FILES = (1_000, 10_000, 100_000)
SMALL_PROCESSES = 500
THREADS = 64
PASSES = 20
OWN_FILES = 100  # file descriptors that a process has anyway


@contextmanager
def children(pod: LightPod, count: int, prepare: Callable[[], None]) -> Iterator[None]:
    """So many processes in the pod, each after `prepare`, while the context lasts."""
    end, ready = os.pipe(), os.pipe()
    pids = []
    for _ in range(count):
        pid = os.fork()
        if not pid:
            try:
                os.close(end[1])
                os.close(ready[0])
                pod.enter()
                prepare()
                os.write(ready[1], b"r")
                os.close(ready[1])
                os.read(end[0], 1)  # until the parent closes it
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        pids.append(pid)
    os.close(ready[1])
    try:
        arrived = 0
        while arrived < count:
            said = os.read(ready[0], count)
            if not said:
                raise RuntimeError("a process did not do what it is measured for")
            arrived += len(said)
        yield
    finally:
        for fd in (*end, ready[0]):
            os.close(fd)
        for pid in pids:
            os.waitpid(pid, 0)


def open_files(count: int) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    for _ in range(count):
        os.dup(fd)


def start_threads() -> None:
    for _ in range(THREADS):
        threading.Thread(target=threading.Event().wait, daemon=True).start()


def of_a_pass(pod: LightPod) -> dict[str, float]:
    """CPU time of a pass, in microseconds."""
    spent = []
    for _ in range(PASSES):
        before = time.process_time_ns()
        pod.visit()
        spent.append((time.process_time_ns() - before) / 1e3)
    return {"least": round(min(spent), 1), "median": round(statistics.median(spent), 1)}


def main() -> dict[str, Any]:
    found: dict[str, Any] = {"load": os.getloadavg()[0], "unit": "us of CPU a pass"}
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with accelerated(passes=False) as pod:
        found["no process"] = of_a_pass(pod)
        for count in FILES:
            processes = -(-count // (most - OWN_FILES))
            with children(pod, processes, functools.partial(open_files, count // processes)):
                found[f"{count} open files of {processes} process(es)"] = of_a_pass(pod)
        with children(pod, SMALL_PROCESSES, lambda: None):
            found[f"{SMALL_PROCESSES} small processes"] = of_a_pass(pod)
        with children(pod, 1, start_threads):
            found[f"{THREADS} threads"] = of_a_pass(pod)
    return found
