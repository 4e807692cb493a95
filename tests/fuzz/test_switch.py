# SPDX-License-Identifier: Apache-2.0
"""The rules of the switch, the real C, against a model of the kernel around them."""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.fuzz import mutants, switch
from tests.fuzz.mutants import Mutant
from tests.fuzz.switch import (
    BOUND,
    LARGEST,
    LOOK,
    MESSAGE_COST,
    NAGLE,
    NEWEST,
    NOTHING,
    OVERDUE,
    PACING,
    RCVBUF,
    SNDBUF,
    STRICT,
    WINDOW,
    WRAP,
    Broken,
    Connection,
    Kernel,
    Rules,
)

SIDE = st.sampled_from((0, 1))
BOTH = st.tuples(st.booleans(), st.booleans())
GATHERS = st.tuples(st.integers(NOTHING, WINDOW), st.integers(NOTHING, WINDOW))
SIZE = st.one_of(st.integers(1, 64), st.integers(1, LARGEST))
# Near the wrap, and anywhere.
ISN = st.one_of(st.integers(WRAP - 5000, WRAP - 1), st.integers(0, WRAP - 1))


@cache
def rules(mutant: Mutant | None = None, kernel: Kernel = NEWEST) -> Rules:
    """Compiled once; a library of its own for each mutant and kind of kernel."""
    edit = mutant.edit if mutant else str
    return switch.built(Path(tempfile.mkdtemp(prefix="tb-switch-")), kernel, edit)


class Machine(RuleBasedStateMachine):
    """Everything two applications and an operator can do to one connection."""

    kernel = NEWEST

    @initialize(
        isn=st.tuples(ISN, ISN),
        proxies=BOTH,
        nonblocking=BOTH,
        gathers=GATHERS,
        accepted=st.booleans(),
    )
    def connect(
        self,
        isn: tuple[int, int],
        proxies: tuple[bool, bool],
        nonblocking: tuple[bool, bool],
        gathers: tuple[int, int],
        *,
        accepted: bool,
    ) -> None:
        compiled = rules(kernel=self.kernel)
        self.connection = Connection(compiled, isn, proxies, nonblocking, gathers)
        self.connection.accept(1, accepted=accepted)

    def is_accepted(self) -> bool:
        return self.connection.ends[1].accepted

    @precondition(lambda self: not self.is_accepted())
    @rule()
    def accept(self) -> None:
        self.connection.accept(1)

    @rule(sender=SIDE, size=SIZE, times=st.integers(1, 4))
    def send(self, sender: int, size: int, times: int) -> None:
        for _ in range(times):
            self._send(sender, size)

    def _send(self, sender: int, size: int) -> None:
        if self.connection.ends[sender].accepted and not self.connection.ends[sender].shut:
            self.connection.send(sender, size)

    @rule(reader=SIDE, size=SIZE)
    def read(self, reader: int, size: int) -> None:
        self.connection.read(reader, size)

    @rule(reader=SIDE)
    def read_everything(self, reader: int) -> None:
        self.connection.read_everything(reader)

    @rule(reader=SIDE, size=SIZE)
    def read_and_wait_for_all(self, reader: int, size: int) -> None:
        self.connection.read(reader, size, wait_for_all=True)

    @precondition(is_accepted)
    @rule(reader=SIDE, polling=st.booleans(), lowat=st.sampled_from((1, 1, 1, 100)))
    def wait(self, reader: int, polling: bool, lowat: int) -> None:
        end = self.connection.ends[reader]
        end.polling, end.lowat = polling, lowat

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.connection.pause(paused)

    @rule(speaker=SIDE, times=st.integers(1, 8))
    def acknowledge(self, speaker: int, times: int) -> None:
        self.connection.acknowledge(speaker, times)

    @rule(sender=SIDE, rounds=st.integers(1, 30))
    def stream(self, sender: int, rounds: int) -> None:
        """Small writes, read in one go now and then."""
        for _ in range(rounds):
            for _ in range(60):
                self._send(sender, 10)
            self.read_everything(1 - sender)

    @rule(number=SIDE)
    def make_nonblocking(self, number: int) -> None:
        self.connection.make_nonblocking(number)

    @rule(number=SIDE, size=st.sampled_from((4096, 2 * RCVBUF)))
    def set_rcvbuf(self, number: int, size: int) -> None:
        self.connection.set_rcvbuf(number, size)

    @precondition(is_accepted)
    @precondition(lambda self: not any(end.shut for end in self.connection.ends))
    @rule(number=SIDE)
    def shut(self, number: int) -> None:
        self.connection.shut(number)

    @rule(number=SIDE)
    def encrypt(self, number: int) -> None:
        self.connection.encrypt(number)

    @rule(reader=SIDE, locked=st.booleans())
    def lock(self, reader: int, locked: bool) -> None:
        self.connection.ends[reader].locked = locked

    @precondition(is_accepted)
    @precondition(lambda self: not any(end.wants for end in self.connection.ends))
    @rule(sender=SIDE, unread=st.integers(0, 2000), off=st.sampled_from((0, 0, 1, -1)))
    def wrap(self, sender: int, unread: int, off: int) -> None:
        """4 GiB by TCP, to where the sender's number is again what the peer last declared."""
        self.read_everything(1 - sender)
        declared = self.connection.declared(1 - sender)
        distance = (declared - self.connection.ends[sender].write_seq) % WRAP or WRAP
        # Only the last stretch is sent message by message: of 4 GiB nothing else would come.
        jump = max(distance - 2 * LARGEST, 0)
        end, peer = self.connection.ends[sender], self.connection.ends[1 - sender]
        self.connection.send_by_tcp(sender, 1, 0)
        end.write_seq = (end.write_seq + jump) % WRAP
        peer.copied_seq = (peer.copied_seq + jump) % WRAP
        total = max(distance - 1 - jump + off, 1)
        self.connection.send_by_tcp(sender, total, min(unread, total))


class StrictMachine(Machine):
    """The same on kernels whose TCP drops what passes sk_rcvbuf."""

    kernel = STRICT


def examples(number: int) -> settings:
    return settings(
        max_examples=number,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


TestSwitch = Machine.TestCase
TestSwitch.settings = examples(300)
TestStrictSwitch = StrictMachine.TestCase
TestStrictSwitch.settings = examples(100)


def fresh(
    mutant: Mutant | None = None,
    *,
    kernel: Kernel = NEWEST,
    nonblocking: bool = False,
    sidecar: bool = False,
    greeted: bool = True,
) -> Connection:
    """A connection between two applications; end 1 may be non-blocking, or a sidecar."""
    made = Connection(rules(mutant, kernel), (999, 1999), (False, sidecar), (False, nonblocking))
    if greeted:
        made.greet()
    return made


@pytest.mark.parametrize("nonblocking", [False, True])
def test_bypasses_when_the_first_byte_is_taken(*, nonblocking: bool) -> None:
    connection = fresh(nonblocking=nonblocking, greeted=False)
    assert [connection.send(0, 10) for _ in range(3)] == [False] * 3
    connection.read_everything(1)
    assert not connection.send(1, 10)
    connection.read_everything(0)
    assert connection.send(0, 10)
    connection.read_everything(1)
    assert connection.send(1, 10)


def test_returns_to_the_bypass_once_the_peer_has_spoken() -> None:
    connection = fresh()
    connection.send_by_tcp(0, 100, 0)
    assert not connection.send(0, 10)
    connection.read(1, 10)
    connection.send(1, 5)
    assert connection.send(0, 10)


@pytest.mark.parametrize("addresses", [1, 2])
@pytest.mark.parametrize("sizes", [(200, 5000), (200, 7000), (300, 12_000), (4096, 4096)])
def test_answers_in_two_writes_stay(sizes: tuple[int, int], addresses: int) -> None:
    """The second finds the first one unread, each time; but the reader does keep up."""
    connection = fresh()
    connection.addresses = addresses
    for _ in range(3000):
        for size in sizes:
            assert connection.send(0, size)
        connection.read_everything(1)


def test_leaves_soon_when_memory_is_short() -> None:
    connection = fresh()
    for _ in range(100):
        assert connection.send(0, 10)
        connection.read(1, 10)
    connection.press_for_memory(True)
    bypassed = sum(connection.send(0, 1000) for _ in range(100))
    assert bypassed * 1000 <= LOOK
    assert not connection.send(0, 10)


def bypassed_unread(connection: Connection) -> int:
    """Bytes of a stream that nobody reads."""
    return sum(connection.send(0, 1000) for _ in range(600)) * 1000


@pytest.mark.parametrize("pods", [False, True])
@pytest.mark.parametrize(
    ("limit", "used", "cached", "room"),
    [
        (64, 16, 0, 44),
        (64, 56, 0, 4),
        (64, 58, 0, 2),
        (64, 60, 0, 0),
        (64, 64, 6, 0),
        (64, 64, -1, 0),  # statistics may be, for a moment
        (64, 64, 12, 2),
        (4096, 4060, 0, 4),  # no more than 32 MB are nobody's
        (4096, 4000, 0, 64),
    ],
)
def test_leaves_a_container_its_memory(
    limit: int, used: int, cached: int, room: int, *, pods: bool
) -> None:
    """MB. A 16th of the limit is nobody's; half of the cache is free; a connection takes a 16th."""
    everything = bypassed_unread(quick(sidecar=True))
    connection = quick(sidecar=True, greeted=False)
    connection.limit_memory(limit=limit, used=used, cached=cached, pods=pods)
    connection.greet()
    most = min(room * (1 << 20) // 16, everything * 2)
    taken = bypassed_unread(connection)
    assert most / 3 - LOOK <= taken <= most


def test_comes_back_once_a_container_has_memory() -> None:
    connection = fresh()
    connection.limit_memory(limit=1024, used=1000)
    sent = [connection.send(0, 1000) for _ in range(100)]
    assert not sent[-1]
    connection.limit_memory(limit=1024, used=100)
    connection.read_everything(1)
    connection.send(1, 10)
    assert connection.send(0, 1000)


def test_leaves_for_good_where_there_never_is_memory() -> None:
    connection = fresh()
    connection.limit_memory(limit=1024, used=1000)
    for _ in range(300_000):
        connection.send(0, 10)
        connection.read_everything(1)
        connection.send(1, 10)
        connection.read_everything(0)
    assert connection.acknowledge(0, 10)


@pytest.mark.parametrize("sidecar", [False, True])
def test_leaves_whose_receive_buffer_cannot_grow(*, sidecar: bool) -> None:
    connection = quick(sidecar=sidecar)
    assert connection.send(0, 1000)
    connection.read_everything(1)
    connection.set_rcvbuf(1, 2 * RCVBUF)
    bypassed = 0
    for _ in range(100):
        bypassed += connection.send(0, 1000)
        connection.read_everything(1)
    assert bypassed * 1000 <= LOOK
    assert connection.acknowledge(0, 10)


def quick(gathers: int = NOTHING, *, sidecar: bool = False, greeted: bool = True) -> Connection:
    """A connection to an end 1 that is non-blocking, with what makes small writes gather."""
    made = Connection(rules(), (999, 1999), (False, sidecar), (False, True), (gathers, gathers))
    if greeted:
        made.greet()
    return made


def outlives_crowds(connection: Connection, size: int) -> bool:
    """After bytes went by TCP, many writes pile up before each read: does the sender stay?"""
    connection.send_by_tcp(0, 100, 100)
    connection.acknowledge(0)
    connection.read_everything(1)
    for _ in range(100):
        for _ in range(400):
            connection.send(0, size)
        connection.read_everything(1)
        if connection.acknowledge(0, 2):
            return False
    return True


@pytest.mark.parametrize(
    ("gathers", "size", "stays"),
    [(NOTHING, 100, True), (NOTHING, 200, False), (WINDOW, 10, False), (NAGLE, 10, False)],
)
def test_a_crowd_of_small_writes_stays_where_nothing_gathers_them(
    gathers: int, size: int, *, stays: bool
) -> None:
    assert outlives_crowds(quick(gathers), size) is stays


SOON = 3_000  # messages
PILES = (100, 150, 225, 330, 500, 750, 1100, 1600, 10)  # messages, more and more at a time
LATE = 300_000


@pytest.mark.parametrize(
    ("sizes", "gathers", "polling", "lowat", "soon"),
    [
        ([100], NOTHING, False, 1, False),
        ([100], PACING, False, 1, True),
        ([100], NAGLE, False, 1, True),
        ([100], WINDOW, False, 1, True),
        ([20_000], NOTHING, False, 1, True),
        ([16_384, 100], NOTHING, False, 1, True),
        ([100, 16_384], NOTHING, False, 1, True),
        # Who sleeps does not let them return to the bypass, however soon it has read everything.
        ([100], NOTHING, True, 1, True),
        ([100], NOTHING, False, 2, True),
    ],
)
def test_what_never_drains_leaves(
    sizes: list[int], gathers: int, lowat: int, *, polling: bool, soon: bool
) -> None:
    """Small writes that do not gather for good only after a while: TCP may be faster so long."""
    connection = quick(gathers)
    connection.ends[1].polling, connection.ends[1].lowat = polling, lowat
    connection.send_by_tcp(0, 100, 100)
    messages = 0
    while not connection.acknowledge(0, 2):
        size = sizes[messages % len(sizes)]
        connection.send(0, size)
        connection.read(1, size)
        messages += 1
        assert messages < LATE
    assert (messages < SOON) is soon


def test_large_bursts_do_not_outweigh_many_requests() -> None:
    connection = quick(sidecar=True)
    for _ in range(20):
        for _ in range(160):
            connection.send(0, 65_536)
        connection.read_everything(1)
        for _ in range(1500):
            assert connection.send(0, 100)
            connection.read_everything(1)
    assert not connection.acknowledge(0, 2)


def unread_by_tcp(connection: Connection) -> None:
    """The peer has read half of what came by TCP and says so; then comes more."""
    connection.send_by_tcp(0, 20, 20)
    connection.read(1, 10)
    connection.send(1, 5)
    connection.send(0, 10)


def asleep_on_tcp(connection: Connection) -> None:
    """A reader that waits for all has part of it by TCP; its own end speaks; then comes more."""
    connection.send_by_tcp(0, 10, 10)
    connection.read(1, 20, wait_for_all=True)
    connection.send(1, 5)
    connection.send(0, 10)


def unread_after_wrap(connection: Connection) -> None:
    """The peer's only mark is seen not to fit; 4 GiB later its number fits, with bytes unread."""
    connection.send_by_tcp(0, 100, 0)
    connection.send(0, 10)
    connection.read(1, 10)
    end, peer = connection.ends
    jump = WRAP - 110 - 1000
    end.write_seq = (end.write_seq + jump) % WRAP
    peer.copied_seq = (peer.copied_seq + jump) % WRAP
    connection.send_by_tcp(0, 1000, 500)
    connection.send(0, 10)


def never_read(connection: Connection) -> None:
    """A peer that does not read."""
    connection.bounded = RCVBUF + SNDBUF // 4 + OVERDUE + 2 * LOOK
    for _ in range(10_000):
        connection.send(0, 4096)


def stream_until_parting(connection: Connection) -> None:
    """End 0 sends what TCP would coalesce, until it begins to leave the sockhash."""
    for pile in PILES:
        for _ in range(pile):
            if not connection.send(0, 10):
                return
        connection.read_everything(1)
    raise AssertionError("a stream of small writes goes on bypassing")


@pytest.mark.parametrize("sidecar", [False, True])
@pytest.mark.parametrize("unread", [1, 50])
def test_is_left_when_its_queue_is_empty(unread: int, *, sidecar: bool) -> None:
    """A reader that peeks sees bypassed bytes only, as long as any are unread."""
    connection = quick(sidecar=sidecar)
    for _ in range(unread):
        assert connection.send(0, 10)
    connection.pause(True)
    for _ in range(10):
        assert connection.send(0, 10)
    connection.read_everything(1)
    assert not connection.send(0, 10)


@pytest.mark.parametrize("sidecar", [False, True])
def test_is_left_when_it_does_not_read(*, sidecar: bool) -> None:
    connection = quick(sidecar=sidecar)
    assert connection.send(0, 10)
    connection.pause(True)
    assert not all(connection.send(0, 4096) for _ in range(2 * BOUND // 4096))


def leaves_with_bytes_unread(connection: Connection) -> None:
    """A stream's sender has not read what it was sent itself."""
    connection.send(1, 10)
    stream_until_parting(connection)
    assert not connection.acknowledge(0, 10)
    connection.read(0, 10)
    assert connection.acknowledge(0, 10)


def leaves_with_a_redirect_on_its_way(connection: Connection) -> None:
    """A thread at the other end has decided on a redirect, and the kernel has not queued it yet."""
    connection.start_redirect(1, 10, thread=2)
    stream_until_parting(connection)
    connection.acknowledge(0, 10)
    connection.arrive(1)
    connection.read(0, 10)
    assert connection.acknowledge(0, 10)


def redirects_to_the_leaving(connection: Connection) -> None:
    """Nobody is inside a call at the other end; then two threads are, and know nothing of it."""
    assert connection.send(1, 10, thread=5)  # so that thread 7 is in no position to part
    connection.read(0, 10)
    stream_until_parting(connection)
    assert not connection.acknowledge(0, 3)
    connection.ends[1].others_inside = 2
    if connection.start_redirect(1, 10, thread=7):
        raise Broken("a redirect to a socket that may leave at any moment")


def follows_with_bytes_unread(connection: Connection) -> None:
    """A sidecar, which is left at the bound, has read nothing of a stream."""
    for _ in range(1000):
        connection.send(0, 65_536)
    assert connection.ends[1].bypass_queue
    assert connection.acknowledge(0, 20)
    assert not connection.ends[1].left
    connection.read_everything(1)
    connection.acknowledge(0)
    assert connection.ends[1].left


def follows_too_soon(connection: Connection) -> None:
    """A thread of the reader's has decided on a redirect to a sender that is about to leave."""
    connection.send(1, 10)  # unread: the next one must not part
    stream_until_parting(connection)
    connection.read(1, 100_000)
    assert connection.start_redirect(1, 10, thread=1)
    connection.read(0, 10)
    connection.acknowledge(0, 20)
    connection.arrive(1)


def parts_with_a_redirect_on_its_way(connection: Connection) -> None:
    """One thread streams, while another's redirect is decided upon and not yet queued."""
    connection.start_redirect(0, 10, thread=2)
    for pile in PILES:
        for _ in range(pile):
            connection.send(0, 10, thread=1)
        connection.read_everything(1)
        connection.acknowledge(0, 2)
    connection.arrive(0)


def parts_on_tcp_with_a_redirect_on_its_way(connection: Connection) -> None:
    """The same, but the streaming thread has been thrown back to TCP for want of memory."""
    assert connection.send(0, 10, thread=1)
    connection.read(1, 10)
    connection.start_redirect(0, 10, thread=2)
    connection.press_for_memory(True)
    for _ in range(3000):
        connection.send(0, 10, thread=1)
        connection.read_everything(1)
    connection.acknowledge(0, 20)
    connection.arrive(0)


@pytest.mark.parametrize("speaks", [True, False])
def test_both_ends_of_a_stream_leave_and_go_on(*, speaks: bool) -> None:
    connection = fresh()
    stream_until_parting(connection)
    assert not connection.acknowledge(0, 3)
    if speaks:
        assert not connection.send(1, 10)
    assert connection.is_called()
    assert connection.acknowledge(0, 20)
    assert connection.ends[1].left
    assert not connection.is_called()
    for sender in (0, 1, 0, 1):
        assert not connection.send(sender, 10)
        connection.read(1 - sender, 10_000)


def silent_with_bytes_unread(connection: Connection) -> None:
    """A non-blocking reader need not speak first, but it must have read everything."""
    connection.send_by_tcp(0, 100, 100)
    connection.read(1, 50)
    assert not connection.send(0, 10)
    connection.read(1, 60)
    assert connection.send(0, 10)


def asleep_before_it_was_nonblocking(connection: Connection) -> None:
    """A reader that waits for all has part by TCP; then its file is made non-blocking."""
    connection.send_by_tcp(0, 10, 10)
    connection.read(1, 20, wait_for_all=True)
    connection.make_nonblocking(1)
    connection.send(0, 10)


def said_before_it_has_taken_any(connection: Connection) -> None:
    """A server that is not accepted, or peeks; and a client whose server speaks first."""
    connection.accept(1, accepted=False)
    for sender in (0, 1):
        for _ in range(3):
            connection.send(sender, 100)
    connection.accept(1)
    connection.read_everything(1)
    connection.send(1, 100)
    connection.read_everything(0)
    assert connection.send(0, 100)


def answers_after_the_end(connection: Connection) -> None:
    """One end has shut down; the other goes on."""
    assert connection.send(0, 10)
    assert connection.send(1, 10)
    connection.read_everything(1)
    connection.shut(0)
    assert connection.send(1, 10)  # behind what lies unread
    connection.read_everything(0)
    for _ in range(3):
        assert not connection.send(1, 10)
        connection.read_everything(0)


def piles_up(connection: Connection) -> None:
    """A peer that does not read, for a while."""
    for _ in range(300):
        connection.send(0, 1000)


@pytest.mark.parametrize("offered", [0, RCVBUF // 4, RCVBUF * 3 // 4, RCVBUF * 15 // 16])
def test_leaves_a_strict_kernel_what_tcp_has_offered(offered: int) -> None:
    connection = fresh(kernel=STRICT, sidecar=True, greeted=False)
    connection.offer(1, offered)
    connection.greet()
    bound = min(RCVBUF // 4, (RCVBUF - offered) // 2)
    each = 1000 + MESSAGE_COST
    bypassed = sum(connection.send(0, 1000) for _ in range(300)) * each
    assert bound - 2 * each < bypassed <= bound  # the greeting may count as well


BREAKS = [
    (mutants.PEEKERS, said_before_it_has_taken_any),
    (mutants.HALF_CLOSED, answers_after_the_end),
    (mutants.STRICTNESS, piles_up),
    (mutants.ORDER, unread_by_tcp),
    (mutants.WAKE_UP, asleep_on_tcp),
    (mutants.STALE_MARK, unread_after_wrap),
    (mutants.BACKPRESSURE, never_read),
    (mutants.LEAVING_UNREAD, leaves_with_bytes_unread),
    (mutants.FOLLOWING_UNREAD, follows_with_bytes_unread),
    (mutants.FOLLOWING_TOO_SOON, follows_too_soon),
    (mutants.PARTING_BLINDLY, parts_on_tcp_with_a_redirect_on_its_way),
    (mutants.OVERTAKING, parts_with_a_redirect_on_its_way),
    (mutants.LEAVING_BLINDLY, leaves_with_a_redirect_on_its_way),
    (mutants.LEAVING_OPENLY, redirects_to_the_leaving),
    (mutants.LEAVING_UNHEARD, redirects_to_the_leaving),
    (mutants.SILENT_WAKE_UP, asleep_before_it_was_nonblocking),
    (mutants.SILENT_ORDER, silent_with_bytes_unread),
]


# Where a story needs another connection than fresh() makes by itself.
MAKERS = {
    mutants.PEEKERS: partial(fresh, nonblocking=True, greeted=False),
    mutants.STRICTNESS: partial(fresh, kernel=STRICT),
    mutants.FOLLOWING_UNREAD: partial(fresh, sidecar=True),
    mutants.SILENT_ORDER: partial(fresh, nonblocking=True),
}


@pytest.mark.parametrize(("mutant", "story"), BREAKS, ids=lambda value: getattr(value, "rule", ""))
def test_stories_break_without_their_rule(mutant: Mutant, story: object) -> None:
    assert callable(story)
    make = MAKERS.get(mutant, fresh)
    story(make())
    with pytest.raises(Broken):
        story(make(mutant))
