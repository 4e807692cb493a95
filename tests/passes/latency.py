# SPDX-License-Identifier: Apache-2.0
"""An application's round trips with 20 passes a second over its process, and without, in turn."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from install.program.probes import connected
from tests.light import LightPod, accelerated

PASSES_A_SECOND = 20
CONNECTIONS = 200  # idle ones in the same process
WINDOW_S = 2.0
MESSAGE = bytes(64)
PERCENTS = (50, 99, 99.9)


def application(pod: LightPod, is_on: mmap.mmap, line: Connection, windows: int) -> None:
    """Nanoseconds of each round trip, without passes and with them, go down the line."""
    pod.enter()
    took: tuple[list[int], list[int]] = ([], [])
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            stack.enter_context(connected(greet=False))
        client, server = stack.enter_context(connected())
        for window in range(windows):
            is_on[0] = window % 2
            end = time.perf_counter_ns() + int(WINDOW_S * 1e9)
            while (start := time.perf_counter_ns()) < end:
                client.send(MESSAGE)
                server.recv(64)
                server.send(MESSAGE)
                client.recv(64)
                took[window % 2].append(time.perf_counter_ns() - start)
    line.send(took)


def percentiles(took: list[int]) -> dict[str, float]:
    """In microseconds."""
    ordered = sorted(took)
    at = {f"p{percent}": ordered[int(len(ordered) * percent / 100)] for percent in PERCENTS}
    return {name: round(ns / 1e3, 1) for name, ns in at.items()} | {"round trips": len(took)}


def main(seconds: float = 40) -> dict[str, Any]:
    fork = multiprocessing.get_context("fork")
    is_on = mmap.mmap(-1, 1)
    ours, theirs = fork.Pipe()
    load = os.getloadavg()[0]
    passes = 0
    with accelerated(passes=False) as pod:
        arguments = (pod, is_on, theirs, 2 * int(seconds / 2 / WINDOW_S))
        process = fork.Process(target=application, args=arguments, daemon=True)
        process.start()
        while not ours.poll(1 / PASSES_A_SECOND):
            if is_on[0]:
                pod.visit()
                passes += 1
        without, beside = ours.recv()
        process.join()
    return {
        "load": load,
        "unit": "us",
        "no passes": percentiles(without),
        f"{PASSES_A_SECOND} passes a second": percentiles(beside),
        "passes": passes,
    }
