# SPDX-License-Identifier: Apache-2.0
"""Connections too young to join: bpf/data_path/pairing.h, TB_MIN_SEGMENTS and TB_MIN_AGE; and those
that would soon leave: known.h, TB_LARGE_EXCHANGE."""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from bpf.loader import Programs
from tests import light
from tests.fuzz.cases import Ends, heard, holds
from tests.light import LIMITS, LightPod

YOUNG_MS = 200
ANSWER = 1 << 20


@contextmanager
def accelerated_after(exchanges: int, age_ms: int = 0) -> Iterator[LightPod]:
    """Connections so old join after so many exchanges that are watched."""
    limits = replace(LIMITS, segments=8, exchanges=exchanges, age_ms=age_ms)
    with closing(Programs(limits)) as programs, light.accelerated(programs) as made:
        yield made


@pytest.fixture
def pod() -> Iterator[LightPod]:
    with accelerated_after(8, YOUNG_MS) as made:
        yield made


def test_a_short_connection_is_left_alone(pod: LightPod) -> None:
    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        ends.exchange()
        ends.exchange()
        return True

    assert holds(ask, pod)
    total = pod.total()
    assert (total.connections, total.joined) == ({}, 0)
    assert total.tcp_messages == {}


def test_an_older_one_joins_with_its_next_exchanges(pod: LightPod) -> None:
    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        ends.exchange()
        time.sleep(1.5 * YOUNG_MS / 1000)
        ends.join(pod)
        return True

    assert holds(ask, pod)
    assert pod.total().joined == 2
    assert pod.total().connections == {"paired": 2}


def ask_for_a_large_answer(ends: Ends, pool: ThreadPoolExecutor) -> None:
    """One exchange of 1 MB."""
    ends.client.send(b"ping")
    assert heard(ends.server, 4) == b"ping"
    answer = pool.submit(heard, ends.client, ANSWER)
    sent = 0
    while sent < ANSWER:
        select.select([], [ends.server], [], 5)
        sent += ends.server.send(bytes(ANSWER - sent))
    assert len(answer.result()) == ANSWER


def test_large_answers_go_by_tcp_until_there_are_small_ones(pod: LightPod) -> None:
    """Most of such an answer would go by TCP from within the sockhash, where that costs more."""

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        with ThreadPoolExecutor(1) as pool:
            for _ in range(3):  # both ends are looked at
                ask_for_a_large_answer(ends, pool)
            time.sleep(1.5 * YOUNG_MS / 1000)
            for _ in range(12):
                ask_for_a_large_answer(ends, pool)
        assert pod.total().joined == 0
        ends.join(pod)
        return True

    assert holds(ask, pod)
    total = pod.total()
    assert (total.joined, total.left) == (2, 0)
    assert "stream" not in total.connections


def test_a_connection_of_large_answers_is_left_alone(pod: LightPod) -> None:
    """Each end gives up after it has backed off three times: 4 + 16 + 64 + 256 exchanges."""

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        with ThreadPoolExecutor(1) as pool:
            for _ in range(900):
                ask_for_a_large_answer(ends, pool)
                time.sleep(2 * YOUNG_MS / 1000 / 900)
        return True

    assert holds(ask, pod)
    total = pod.total()
    assert total.connections == {"paired": 2, "stream": 2}
    assert total.joined == 0


def test_one_that_mixes_sizes_joins_however_long_it_waits(pod: LightPod) -> None:
    """A large answer counts for little once the connection is known."""

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        with ThreadPoolExecutor(1) as pool:
            pod.pause()
            for number in range(2000):
                ends.exchange()
                if number % 50 == 49:
                    ask_for_a_large_answer(ends, pool)
                    time.sleep(2 * YOUNG_MS / 1000 / 40)
            pod.pause(False)
        ends.join(pod)
        return True

    assert holds(ask, pod)
    assert pod.total().joined == 2
    assert pod.total().connections == {"paired": 2}


def test_both_ends_come_back_after_large_answers(pod: LightPod) -> None:
    """They leave together and join together, however often; and each time bytes bypass."""

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod)
        with ThreadPoolExecutor(1) as pool:
            for cycle in range(1, 6):
                while pod.total().left < 2 * cycle:
                    ask_for_a_large_answer(ends, pool)
                ends.join(pod)
                before = pod.total().bypassed_messages
                while pod.total().bypassed_messages == before:
                    ends.exchange()
        return True

    assert holds(ask, pod)
    total = pod.total()
    assert (total.joined, total.left) == (12, 10)
    assert total.connections == {"paired": 2}


def test_a_member_that_was_worth_it_comes_back_soon() -> None:
    """However often it has left: bytes bypass again after as few exchanges as the first time."""
    waited = []

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod)
        with ThreadPoolExecutor(1) as pool:
            for cycle in range(1, 7):
                for _ in range(16_500):  # TB_WORTH_IT
                    ends.exchange()
                while pod.total().left < 2 * cycle:
                    ask_for_a_large_answer(ends, pool)
                before = pod.total().tcp_messages["waiting"]
                ends.join(pod)
                waited.append(pod.total().tcp_messages["waiting"] - before)
        # Passes take a while, too. Having backed off six times it would want 4 ** 7.
        return max(waited) < 4000

    with accelerated_after(8) as pod:
        assert holds(ask, pod)
        assert pod.total().joined == 14


def test_a_large_answer_behind_small_ones_is_no_stream() -> None:
    """An end that wants many exchanges, since it has backed off, still joins after those."""

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        with ThreadPoolExecutor(1) as pool:
            for _ in range(4 + 16 + 64 + 30):
                ask_for_a_large_answer(ends, pool)
            for _ in range(400):  # 256 wanted; the others are watched
                ends.exchange()
            ask_for_a_large_answer(ends, pool)
        ends.exchange()
        return True

    with accelerated_after(1000) as pod:
        assert holds(ask, pod)
        assert pod.total().connections == {"paired": 2}
