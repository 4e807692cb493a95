# SPDX-License-Identifier: Apache-2.0
"""containerd killed and started again, with pods running and in the middle of calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest

from bpf import pins
from tests.containerd.bed import Pod, RuntimeBed, run
from tests.containerd.cri import CriError
from tests.containerd.inventory import SEEN_RESULTS, attached

PODS = 8
KILLS = 4  # spread over the time that PODS calls at once take

# Ours begins as its loader, and each as a fork of the runtime.
PLUGINS = {"bridge", "host-local", "loopback", "tcpip-bypass", "ld-glibc.so.2", "containerd"}
PLUGIN_TIMEOUT_S = 30

Calls = list[Callable[[], object]]


def test_pods_outlive_containerd(bed: RuntimeBed) -> None:
    with made(bed, "survivor") as pods:
        sandboxes = run(pods)
        bed.containerd.kill()
        bed.containerd.start()
        for pod, sandbox in zip(pods, sandboxes):
            assert bed.cri.sandbox_status(sandbox).ready
            assert attached(pod.cgroup) == [pins.SOCK_OPS_NAME]
            pod.end_sandbox(sandbox)
            assert attached(pod.cgroup) == []


def test_what_the_bed_does_about_a_torn_result(bed: RuntimeBed) -> None:
    """Until it does, no later test could end its sandboxes."""
    with made(bed, "torn") as pods:
        run(pods)
        torn = next(name for name in bed.added()["CNI results"] if name.endswith("eth0"))
        bed.node.run(["truncate", "--size=0", SEEN_RESULTS / torn])
        if bed.containerd.release.cni_version == "1.0.0":  # newer ones take it for none
            with pytest.raises(CriError, match="unexpected end of JSON"):
                bed.end_all_sandboxes()
        bed.remove_torn_results()
        bed.end_all_sandboxes()


def test_killed_while_sandboxes_are_being_made(bed: RuntimeBed) -> None:
    def runs(pods: list[Pod]) -> Calls:
        return [pod.run_sandbox for pod in pods]

    kill_again_and_again(bed, runs)


def test_killed_while_sandboxes_are_being_ended(bed: RuntimeBed) -> None:
    def ends(pods: list[Pod]) -> Calls:
        return [partial(pod.end_sandbox, sandbox) for pod, sandbox in zip(pods, run(pods))]

    kill_again_and_again(bed, ends)


def kill_again_and_again(bed: RuntimeBed, calls_of: Callable[[list[Pod]], Calls]) -> None:
    """Kill containerd early, later and late in a set of calls; clean up as kubelet does."""
    failed_calls = 0
    with made(bed, "measured") as pods:
        duration_s = time_of(calls_of(pods))
        bed.end_all_sandboxes()
    for number in range(KILLS):
        with made(bed, f"killed-{number}") as pods:
            moment_s = duration_s * (number + 0.5) / KILLS
            failed_calls += kill_amid(bed, calls_of(pods), moment_s)
            bed.end_all_sandboxes()
            assert owners_of_records(bed) <= forgotten_sandboxes(bed)
            bed.collect_garbage()
            assert [attached(pod.cgroup) for pod in pods] == [[]] * PODS
            assert owners_of_records(bed) == set()
            bed.remove_what_containerd_forgot()
            run(pods, attempt=1)
            assert [attached(pod.cgroup) for pod in pods] == [[pins.SOCK_OPS_NAME]] * PODS
            bed.end_all_sandboxes()
        left = bed.leftovers()
        assert not any(left.values()), left
    assert failed_calls >= KILLS


@contextmanager
def made(bed: RuntimeBed, name: str) -> Iterator[list[Pod]]:
    """PODS pods, with no sandboxes yet."""
    with ExitStack() as stack:
        yield [stack.enter_context(bed.pod(f"{name}-{number}")) for number in range(PODS)]


def time_of(calls: Calls) -> float:
    """Seconds that calls take when all begin at once."""
    began = time.monotonic()
    with ThreadPoolExecutor(len(calls)) as pool:
        for each in [pool.submit(call) for call in calls]:
            each.result()
    return time.monotonic() - began


def kill_amid(bed: RuntimeBed, calls: Calls, moment_s: float) -> int:
    """Begin calls all at once, kill containerd and start it; returns how many calls it failed."""
    with ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(call) for call in calls]
        time.sleep(moment_s)
        bed.containerd.kill()
        errors = [each.exception() for each in running]
    wait_for_plugins(bed)
    bed.remove_torn_results()
    bed.containerd.start()
    assert all(error is None or isinstance(error, CriError) for error in errors), errors
    return sum(error is not None for error in errors)


def wait_for_plugins(bed: RuntimeBed) -> None:
    """The plugins of a killed runtime go on; an ADD that a DEL overtook would be nobody's."""
    deadline = time.monotonic() + PLUGIN_TIMEOUT_S
    while running := PLUGINS & set(bed.node.processes().values()):
        assert time.monotonic() < deadline, running
        time.sleep(0.01)


def owners_of_records(bed: RuntimeBed) -> set[str]:
    """The sandboxes that our plugin remembers."""
    return {name.partition(":")[0] for name in bed.added()["attachment records"]}


def forgotten_sandboxes(bed: RuntimeBed) -> set[str]:
    """Sandboxes that plugins were called for and that the runtime knows nothing of any more.

    containerd 1.6 has none. Later ones have those whose making a kill broke off; CNI's cache
    then holds at least the result for the loopback interface.
    """
    known = set(bed.cri.sandbox_ids())
    return {name.split("-")[-2] for name in bed.added()["CNI results"]} - known
