# SPDX-License-Identifier: Apache-2.0
"""Connections too young to join: bpf/data_path/pairing.h, TB_MIN_SEGMENTS and TB_MIN_AGE; and those
that would soon leave: known.h, TB_LARGE_EXCHANGE. How they are visited: lookup.h."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from bpf import abi, trust
from bpf.loader import Programs
from install.program import lookups, passes
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


@pytest.fixture
def by_lookup(monkeypatch: pytest.MonkeyPatch) -> Iterator[Programs]:
    """As on a kernel where no program may go from a file to its socket."""
    monkeypatch.setattr(trust, "reaches_sockets", lambda _btf: False)
    with closing(Programs(LIMITS)) as programs:
        yield programs


def until_left(pod: LightPod) -> None:
    deadline = time.monotonic() + light.PATIENCE_S
    while pod.members():
        assert time.monotonic() < deadline, f"{pod.members()} sockets have not left"
        time.sleep(0.01)


@pytest.mark.parametrize("device", [b"", b"lo"])
def test_by_their_addresses_sockets_join_and_leave(by_lookup: Programs, device: bytes) -> None:
    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        ends.client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        ends.join(pod)
        ends.exchange()
        pod.control(abi.CONTROL_LEAVE)
        until_left(pod)
        ends.exchange()
        return True

    with light.accelerated(by_lookup) as pod:
        assert holds(ask, pod)
        assert pod.total().bypassed_messages >= 2


def test_another_socket_at_those_addresses_is_left_alone(
    by_lookup: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RULE (lookup): the addresses were another socket's when it was named."""
    visit = lookups.visit

    def elsewhere(found: abi.Found, copy: socket.socket) -> int:
        found.sk += 64
        return visit(found, copy)

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        for _ in range(light.ACQUAINTANCE):
            ends.exchange()
        monkeypatch.setattr(lookups, "visit", elsewhere)
        pod.visit()
        assert not pod.members()
        monkeypatch.setattr(lookups, "visit", visit)
        pod.visit()
        return pod.members() == 2

    with light.accelerated(by_lookup, passes=False) as pod:
        assert holds(ask, pod)


@pytest.mark.parametrize(
    ("listens", "address", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", "7f0000017f000001"),
        ("127.0.0.1", "::ffff:127.0.0.1", "7f0000017f000001"),
        ("::1", "::1", f"{1:032x}{1:032x}"),
    ],
)
def test_the_packet_says_which_socket(listens: str, address: str, expected: str) -> None:
    families = [socket.AF_INET6 if ":" in each else socket.AF_INET for each in (listens, address)]
    with (
        socket.create_server((listens, 0), family=families[0]) as listener,
        socket.socket(families[1]) as client,
    ):
        client.connect((address, listener.getsockname()[1]))
        own, peer = client.getsockname()[1], client.getpeername()[1]
        made = abi.Lookup.from_buffer_copy(lookups.packet(client, 4711), 14)
    ends = bytes.fromhex(expected) + peer.to_bytes(2, "big") + own.to_bytes(2, "big")
    assert (made.sk, made.is_ipv4) == (4711, address != "::1")
    assert bytes(made.tuple) == ends.ljust(36, b"\0")


def test_what_a_visit_wrote_is_told_apart() -> None:
    """Numbers of files, sockets that are yet to be visited, and that a next step may follow."""
    named = [abi.Found(mark=abi.LOOK_UP, fd=fd, visitor=7, sk=1 << 40) for fd in (3, 4)]
    again = abi.VISIT_AGAIN.to_bytes(4, "little")
    written = bytes(named[0]) + b"\5\0\0\0" + again + bytes(named[1]) + b"\6\0\0\0"
    readers, found, is_again = passes.parsed(written)
    assert (readers, is_again) == ([5, 6], True)
    assert [(each.fd, each.visitor, each.sk) for each in found] == [
        (3, 7, 1 << 40),
        (4, 7, 1 << 40),
    ]
    assert passes.parsed(b"") == ([], [], False)
