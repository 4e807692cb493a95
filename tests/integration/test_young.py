# SPDX-License-Identifier: Apache-2.0
"""Connections too young to join: bpf/data_path/pairing.h, TB_MIN_SEGMENTS and TB_MIN_AGE; and those
that would soon leave: known.h, TB_LARGE_EXCHANGE. How they are visited: lookup.h."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from bpf import abi, bpfsys, pins, trust
from bpf.loader import VISIT, Programs
from install.program import lookups, passes
from install.program.probes import PART, heard_by_edges
from tests import light
from tests.fuzz.cases import Ends, edges_of, heard, holds
from tests.integration.traffic_pods import eventually
from tests.light import LIMITS, LightPod

YOUNG_MS = 200
ANSWER = 1 << 20
CORKED = 16_384


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


def until_closed(end: socket.socket) -> None:
    tcp_close = 7  # include/net/tcp_states.h
    assert eventually(
        lambda: end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == tcp_close,
        light.PATIENCE_S,
    )


def until_empty(pod: LightPod) -> None:
    sockhash = pod.programs.fds[pins.SOCKHASH]
    assert eventually(lambda: bpfsys.map_is_empty(sockhash), light.PATIENCE_S), "one has not left"


def until_left(pod: LightPod) -> None:
    deadline = time.monotonic() + light.PATIENCE_S
    while pod.members():
        assert time.monotonic() < deadline, f"{pod.members()} sockets have not left"
        time.sleep(0.01)
        with suppress(BlockingIOError):  # a pass is under way
            pod.visit()


def test_one_that_corks_its_answers_leaves_for_good() -> None:
    """They go by TCP, and a few of them use up its credit."""

    def ask(pod: LightPod) -> bool:
        ends, answers = Ends(pod), 0
        while "nagle" not in pod.total().connections:
            answers += 1
            ends.client.send(b"?")
            assert heard(ends.server, 1)
            for is_corked in (1, 0):
                ends.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, is_corked)
                ends.server.send(bytes(CORKED * is_corked))
            assert len(heard(ends.client, CORKED)) == CORKED
        until_left(pod)
        for _ in range(4 * light.ACQUAINTANCE):
            ends.exchange()
        return pod.members() == 0 and answers in range(32, 128)

    with light.accelerated() as pod:
        assert holds(ask, pod)


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

    def exchanged(process: int, sockets: list[abi.Found], wake: Callable[[int], None]) -> bool:
        one, other = sockets
        one.sk, other.sk = other.sk, one.sk
        return visit(process, sockets, wake)

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        for _ in range(light.ACQUAINTANCE):
            ends.exchange()
        pod.visit()
        assert pod.members() == 2
        pod.control(abi.CONTROL_LEAVE)
        monkeypatch.setattr(lookups, "visit", exchanged)
        pod.visit()
        monkeypatch.setattr(lookups, "visit", visit)
        until_left(pod)
        return True

    with light.accelerated(by_lookup, passes=False) as pod:
        assert holds(ask, pod)


def set_control(programs: Programs, flags: int) -> None:
    bpfsys.map_update(programs.fds[pins.CONTROL], bytes(4), bytes(abi.Control(flags)))


def known_to(programs: Programs, end: socket.socket) -> bytes:
    """The ID of a socket's connection there, in 8 bytes; zeros if there is none."""
    conns = programs.fds[pins.CONNS]
    size = bpfsys.map_info(conns).value_size
    return bpfsys.map_lookup(conns, end.fileno().to_bytes(4, "little"), size)[:8]


def test_what_was_stored_by_other_programs_is_not_taken_for_ours(by_lookup: Programs) -> None:
    """A member outlives a load: the new programs keep notes of the same socket."""

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        for _ in range(light.ACQUAINTANCE):
            ends.exchange()
        pod.visit()
        ends.exchange()  # the first messages after a join go by TCP
        ends.exchange()
        pod.reload(new)
        ends.client.send(b"unread")
        set_control(by_lookup, abi.CONTROL_PAUSED)
        for _ in range(2 * light.ACQUAINTANCE):  # by TCP: the new ones get to know it
            ends.server.send(b"more")
            heard(ends.client, 4)
        assert any(known_to(new, ends.server))
        assert heard(ends.server, 6) == b"unread"
        set_control(by_lookup, abi.CONTROL_LEAVE)
        deadline = time.monotonic() + light.PATIENCE_S
        while not bpfsys.map_is_empty(by_lookup.fds[pins.SOCKHASH]):
            assert time.monotonic() < deadline, "a socket has not left"
            passes.visit_pod(by_lookup.fds[VISIT], pod.folder)
        return True

    with closing(Programs(LIMITS)) as new, light.accelerated(by_lookup, passes=False) as pod:
        assert holds(ask, pod)


def test_a_socket_in_close_gets_its_edge_and_leaves(by_lookup: Programs) -> None:
    """It has sent its FIN before, and got the peer's: it cannot be looked up any more, and its
    reader has bytes of both kinds unread."""

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod)
        edges = edges_of(ends.client)
        sent = 0
        while "backlog" not in pod.total().tcp_messages:
            sent += ends.server.send(bytes(8_000))
        ends.client.shutdown(socket.SHUT_WR)
        ends.server.close()
        edges.poll()
        until_closed(ends.client)
        got = len(ends.client.recv(PART))
        heard_bytes = got
        while got == PART:  # until a short read
            got = len(ends.client.recv(PART))
            heard_bytes += got
        assert heard_bytes < sent
        assert heard_bytes + heard_by_edges(edges, ends.client, sent - heard_bytes) == sent
        until_empty(pod)
        return True

    with light.accelerated(by_lookup) as pod:
        assert holds(ask, pod)


def test_two_sockets_in_close_leave(by_lookup: Programs) -> None:
    """Both have bypassed bytes unread. Each leaves once it has read them, also after its peer."""

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod)
        sockets = ends.client, ends.server
        for each in sockets:
            each.send(b"unread")
        for each in sockets:
            each.shutdown(socket.SHUT_WR)
        for each in sockets:
            until_closed(each)
        for each in sockets:
            assert heard(each, 7) == b"unread"
        until_empty(pod)
        return True

    with light.accelerated(by_lookup) as pod:
        assert holds(ask, pod)


def test_a_number_that_is_another_files_by_now(
    by_lookup: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was closed after it was named: it is not visited, as no file of it is held."""
    visit = lookups.visit

    def closed_before(process: int, sockets: list[abi.Found], wake: Callable[[int], None]) -> bool:
        for each in sockets:
            each.fd = kept.fileno()
        return visit(process, sockets, wake)

    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        for _ in range(light.ACQUAINTANCE):
            ends.exchange()
        monkeypatch.setattr(lookups, "visit", closed_before)
        pod.visit()
        return not pod.members()

    with socket.socket() as kept, light.accelerated(by_lookup, passes=False) as pod:
        assert holds(ask, pod)


def test_one_process_that_fails_does_not_keep_others_from_their_visits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    visited = list[int]()

    def visit(_program: int, pid: int) -> bool:
        visited.append(pid)
        if pid == 1:
            raise PermissionError
        return False

    (tmp_path / "cgroup.procs").write_text("1\n2\n3\n")
    monkeypatch.setattr(passes, "visit_process", visit)
    with pytest.raises(PermissionError):
        passes.visit_pod(0, tmp_path)
    assert visited == [1, 2, 3]


def test_a_visit_to_many_files_returns_between_them(pod: LightPod) -> None:
    """What the process closes meanwhile is released then."""
    with ExitStack() as files:
        for _ in range(600):
            files.callback(os.close, os.dup(0))
        written = bpfsys.visit_files(pod.programs.fds[VISIT], os.getpid())
    words = list(memoryview(written).cast("I"))
    assert words.count(abi.NO_FILE) >= 2


def test_what_a_visit_wrote_is_told_apart() -> None:
    """Numbers of files, sockets that are yet to be visited, and that a next step may follow."""
    named = [abi.Found(mark=abi.LOOK_UP, fd=fd, visitor=7, sk=1 << 40) for fd in (3, 4)]
    again = abi.VISIT_AGAIN.to_bytes(4, "little")
    none = abi.NO_FILE.to_bytes(4, "little")
    written = bytes(named[0]) + b"\5\0\0\0" + again + none + bytes(named[1]) + b"\6\0\0\0"
    readers, found, is_again = passes.parsed(written)
    assert (readers, is_again) == ([5, 6], True)
    assert [(each.fd, each.visitor, each.sk) for each in found] == [
        (3, 7, 1 << 40),
        (4, 7, 1 << 40),
    ]
    assert passes.parsed(b"") == ([], [], False)
