# SPDX-License-Identifier: Apache-2.0
"""Many calls at once, for different containers, as a runtime makes them."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest

from cni_plugin import names
from tests.bed import open_bed
from tests.bed.bed import Bed
from tests.integration import plugin_calls
from tests.integration.plugin_calls import Answer, Sandbox

PODS = 24
AT_ONCE = 8


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with open_bed() as made:
        yield made


@pytest.fixture(scope="module")
def pods(bed: Bed) -> Iterator[list[Sandbox]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(plugin_calls.sandbox(bed, f"many-{number}"))
            for number in range(PODS)
        ]


def each(pods: list[Sandbox], command: str) -> list[Answer]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda pod: pod.call(command), pods))


def test_calls_for_different_pods(pods: list[Sandbox]) -> None:
    for _ in range(2):
        added = each(pods, "ADD")
        assert [answer.document for answer in added] == [pod.result for pod in pods]
        assert [pod.owners() for pod in pods] == [[pod.pod_id] for pod in pods]
        assert {answer.exit for answer in each(pods, "CHECK")} == {0}
        assert {answer.exit for answer in each(pods, "DEL")} == {0}
        assert [pod.leftovers() for pod in pods] == [[]] * PODS


def test_adds_while_others_are_deleted(pods: list[Sandbox]) -> None:
    """Every pod's sandbox re-created: old one's DEL and new one's ADD at the same time."""
    assert {answer.exit for answer in each(pods, "ADD")} == {0}
    again = [pod.again(f"{pod.uid}-1") for pod in pods]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        calls = [
            pool.submit(pod.call, command)
            for old, new in zip(pods, again)
            for pod, command in ((new, "ADD"), (old, "DEL"))
        ]
        assert {call.result().exit for call in calls} == {0}
    assert [pod.owners() for pod in again] == [[pod.pod_id] for pod in again]
    assert not any(pod.recorded() for pod in pods)
    assert {answer.exit for answer in each(again, "DEL")} == {0}
    assert [pod.leftovers() for pod in again] == [[]] * PODS


def test_programs_loaded_anew_meanwhile(pods: list[Sandbox]) -> None:
    """An ADD never fails, and ends with its pod on some generation or on the newest."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        loads = pool.submit(lambda: [pods[0].bed.node.load() for _ in range(2)])
        while not loads.done():
            calls = list(pool.map(lambda pod: pod.call("ADD"), pods))
            assert [call.document for call in calls] == [pod.result for pod in pods]
        loads.result()
    assert [pod.owners() for pod in pods] == [[pod.pod_id] for pod in pods]
    assert {answer.exit for answer in each(pods, "DEL")} == {0}
    assert [pod.leftovers() for pod in pods] == [[]] * PODS


def test_a_lock_that_is_never_released(pods: list[Sandbox]) -> None:
    """Somebody stopped while holding it: ADD goes on without us, DEL leaves all to a later call."""
    pod = pods[0]
    fd = os.open(pod.bed.node.state_dir / names.ATTACHMENTS, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        started = time.monotonic()
        answer = pod.call("ADD")
        assert (answer.exit, answer.document) == (0, pod.result)
        assert "has held the lock" in answer.stderr
        assert pod.owners() == []
        answer = pod.call("DEL")
        assert (answer.exit, answer.stdout) == (0, "")
        assert "left for GC" in answer.stderr
        answer = pod.call("GC")
        assert (answer.exit, answer.document["code"]) == (1, 11)
        assert time.monotonic() - started < 25
    finally:
        os.close(fd)
    assert pod.call("DEL").exit == 0
    assert pod.leftovers() == []


def test_a_load_finds_the_kernel_unfit_meanwhile(pods: list[Sandbox]) -> None:
    """An ADD that has read the mode before must not attach by it."""
    pod = replace(pods[0], conf=(("mode", "auto"),))
    node_json = pod.bed.node.state_dir / names.NODE_JSON
    before = node_json.read_bytes()
    node_json.write_text('{"mode": "full"}')
    fd = os.open(pod.bed.node.state_dir / names.ATTACHMENTS, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with ThreadPoolExecutor(1) as pool:
            add = pool.submit(pod.call, "ADD")
            time.sleep(0.8)  # it waits for the lock, for 2 s
            node_json.write_text('{"mode": "off"}')
            fcntl.flock(fd, fcntl.LOCK_UN)
            answer = add.result()
    finally:
        os.close(fd)
        node_json.write_bytes(before)
    assert (answer.exit, answer.document) == (0, pod.result)
    assert "meanwhile" in answer.stderr
    assert (pod.owners(), pod.leftovers()) == ([], [])
