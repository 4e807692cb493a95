# SPDX-License-Identifier: Apache-2.0
"""The rules of the programs, the real C, against a model of the kernel around them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from bpf import abi
from tests.fuzz import mutants, switch
from tests.fuzz.mutants import Mutant
from tests.fuzz.switch import (
    BOUND,
    LARGEST,
    LEAVING,
    LOOK,
    MEMBER,
    MESSAGE_COST,
    OUT,
    RCVBUF,
    REFRESH_NS,
    WRAP,
    Broken,
    Connection,
    Rules,
    Step,
)

SIDE = st.sampled_from((0, 1))
SIZE = st.one_of(st.integers(1, 64), st.integers(1, LARGEST))
# Near the wrap, and anywhere.
ISN = st.one_of(st.integers(WRAP - 5000, WRAP - 1), st.integers(0, WRAP - 1))
FLAGS = st.sampled_from((0, 0, abi.CONTROL_PAUSED, abi.CONTROL_LEAVE))
STEPS = st.lists(st.tuples(st.sampled_from(("begin", "arrive", "read")), SIDE), max_size=8)
VISITS = st.lists(st.tuples(st.sampled_from(("arrive", "read", "visit")), SIDE), max_size=8)


@cache
def rules(mutant: Mutant | None = None, *, strict: bool = False) -> Rules:
    """Compiled once; a library of its own for each mutant and kind of kernel."""
    edit = mutant.edit if mutant else str
    with tempfile.TemporaryDirectory() as folder:  # what is loaded stays
        return switch.built(Path(folder), edit, strict=strict)


def step(connection: Connection, what: str, number: int) -> None:
    """What another CPU may do while a program runs. Each is a moment's work."""
    end = connection.ends[number]
    if what == "begin" and end.state == switch.ESTABLISHED and len(end.redirects) < 3:
        connection.begin(number, 10)
    elif what == "arrive" and end.redirects:
        connection.arrive(number)
    elif what == "read":
        connection.read(number, 2**20)
    elif what == "visit":
        connection.visit(number)


class Machine(RuleBasedStateMachine):
    """Everything two applications, a pass and an operator can do to one connection."""

    mutant: Mutant | None = None

    @initialize(
        isn=st.tuples(ISN, ISN),
        proxies=st.tuples(st.booleans(), st.booleans()),
        pods=st.sampled_from((1, 2)),
    )
    def connect(self, isn: tuple[int, int], proxies: tuple[bool, bool], pods: int) -> None:
        self.connection = Connection(rules(self.mutant), isn, proxies, pods=pods)
        self.connection.join()

    def _may_send(self, sender: int) -> bool:
        return self.connection.ends[sender].state == switch.ESTABLISHED

    @rule(sender=SIDE, size=SIZE, times=st.integers(1, 4), reads=st.booleans())
    def send(self, sender: int, size: int, times: int, *, reads: bool) -> None:
        for _ in range(times if self._may_send(sender) else 0):
            self.connection.send(sender, size)
            if reads:
                self.connection.read_everything(1 - sender)

    @rule(sender=SIDE, look=st.integers(0, 24), steps=st.one_of(STEPS, VISITS))
    def begin(self, sender: int, look: int, steps: list[tuple[str, int]]) -> None:
        """A thread's verdict, with what happens meanwhile. Its redirect may rest on its way."""
        if self._may_send(sender) and len(self.connection.ends[sender].redirects) < 3:
            # A socket's sends take its lock in turn: no other one's verdict comes within this one.
            others = [each for each in steps if each != ("begin", sender)]
            with self._meanwhile(look, others):
                self.connection.begin(sender, 10)

    @rule(number=SIDE, look=st.integers(0, 24), steps=STEPS)
    def visit(self, number: int, look: int, steps: list[tuple[str, int]]) -> None:
        """A visit that does not hold the socket's lock, with what happens meanwhile."""
        with self._meanwhile(look, steps):
            self.connection.visit(number)

    def _meanwhile(self, look: int, steps: list[tuple[str, int]]) -> AbstractContextManager[None]:
        taken: list[Step] = [partial(step, self.connection, *each) for each in steps]
        return self.connection.meanwhile(look, *taken)

    @rule(sender=SIDE)
    def arrive(self, sender: int) -> None:
        step(self.connection, "arrive", sender)

    @rule(times=st.integers(1, 4))
    def passes(self, times: int) -> None:
        for _ in range(times):
            for number in range(2):
                self.connection.visit(number)

    @rule(reader=SIDE, size=SIZE)
    def read(self, reader: int, size: int) -> None:
        self.connection.read(reader, size)

    @rule(reader=SIDE)
    def read_everything(self, reader: int) -> None:
        self.connection.read_everything(reader)

    @rule(reader=SIDE)
    def fall_asleep(self, reader: int) -> None:
        """A read that began before the socket joined; it sees the TCP queue only."""
        end = self.connection.ends[reader]
        end.is_asleep = self.connection.membership(reader) == OUT and not end.tcp_queue

    @precondition(lambda self: any(end.owes_ack for end in self.connection.ends))
    @rule()
    def acknowledge(self) -> None:
        for number, end in enumerate(self.connection.ends):
            if end.owes_ack:
                self.connection.packet(number)

    @rule(flags=FLAGS)
    def switch(self, flags: int) -> None:
        self.connection.flags = flags

    @rule(milliseconds=st.sampled_from((10, 1500)))
    def wait(self, milliseconds: int) -> None:
        self.connection.now += milliseconds * 1_000_000

    @rule(reader=SIDE, owned=st.booleans(), corked=st.booleans())
    def lock(self, reader: int, *, owned: bool, corked: bool) -> None:
        end = self.connection.ends[reader]
        end.is_owned, end.is_corked = owned, corked

    @rule(number=SIDE)
    def turn_blocking(self, number: int) -> None:
        self.connection.ends[number].is_nonblocking = False

    @rule(number=SIDE)
    def turn_nagle_on(self, number: int) -> None:
        self.connection.ends[number].has_nodelay = False

    @rule(number=SIDE)
    def set_options(self, number: int) -> None:
        self.connection.ends[number].has_options = True

    @rule(number=SIDE)
    def encrypt(self, number: int) -> None:
        self.connection.ends[number].has_ulp = True

    @rule(number=SIDE)
    def shut(self, number: int) -> None:
        end, peer = self.connection.ends[number], self.connection.ends[1 - number]
        if end.state == peer.state:
            end.state, peer.state = switch.FIN_WAIT2, switch.CLOSE_WAIT
            peer.has_edge = True

    def teardown(self) -> None:
        if hasattr(self, "connection"):
            self.connection.part()


TestSwitch = Machine.TestCase
TestSwitch.settings = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


Make = Callable[..., Connection]
LOOKS = range(1, 48)  # more than any program's looks at the kernel's memory


def fresh(
    mutant: Mutant | None = None, *, sidecar: bool = False, strict: bool = False, pods: int = 1
) -> Connection:
    """Two applications' ends that have joined; end 1 may be a sidecar's."""
    made = Connection(rules(mutant, strict=strict), proxies=(False, sidecar), pods=pods)
    made.join()
    return made


def echo(connection: Connection, sender: int = 0) -> bool:
    """A message that is read at once; says whether it went by bypass."""
    bypassed = connection.send(sender, 10)
    connection.read_everything(1 - sender)
    return bypassed


def leaves(connection: Connection, number: int, visits: int = 3) -> bool:
    """The operator wants all sockets out; says whether this one is, after so many visits."""
    connection.flags = abi.CONTROL_LEAVE
    for _ in range(visits):
        connection.visit(number)
    return connection.membership(number) == OUT


def test_leaves_in_three_visits_and_joins_again() -> None:
    connection = fresh()
    assert echo(connection)
    assert not leaves(connection, 0, 2)
    assert leaves(connection, 0, 1)
    assert leaves(connection, 1)
    assert not echo(connection)
    connection.flags = 0
    connection.join()
    assert echo(connection)


def test_a_pause_lasts_as_long_as_it_lasts() -> None:
    connection = fresh()
    connection.flags = abi.CONTROL_PAUSED
    assert not echo(connection)
    connection.flags = 0
    assert echo(connection)


def test_a_lone_member_leaves() -> None:
    connection = fresh()
    assert leaves(connection, 1)
    connection.flags = 0
    connection.now += 4 * REFRESH_NS
    for _ in range(3):
        connection.visit(0)
    assert connection.membership(0) == OUT


def test_what_gains_nothing_leaves() -> None:
    connection = fresh()
    for _ in range(1100):
        connection.ends[0].is_corked = True
        echo(connection)
    for _ in range(3):
        connection.visit(0)
    assert connection.membership(0) == OUT


def test_where_memory_is_short_no_socket_is_a_member() -> None:
    connection = fresh()
    connection.rules.host_memory_pressure(1)
    assert not echo(connection)
    for _ in range(3):
        connection.visit(0)
    assert connection.membership(0) == OUT
    for sender in (0, 1) * 24:
        echo(connection, sender)
    connection.packet(0)
    joins(connection)
    connection.rules.host_memory_pressure(-1)  # the kernel's count can be less than 0
    connection.visit(0)
    assert connection.membership(0) != OUT


def test_a_stream_goes_by_tcp_until_it_is_answered() -> None:
    connection = fresh()
    sent = [echo(connection) for _ in range(300)]
    assert sent[0]
    assert not sent[-1]
    echo(connection, 1)
    assert echo(connection)


# ---- Stories that break without their rule ----


def unread_by_tcp(make: Make) -> None:
    connection = make()
    connection.flags = abi.CONTROL_PAUSED
    connection.send(0, 10)
    connection.flags = 0
    connection.send(0, 10)
    connection.settle()


def asleep_on_tcp(make: Make) -> None:
    """A thread has slept in recv since before its file was made non-blocking."""
    connection = make()
    connection.flags = abi.CONTROL_PAUSED
    echo(connection)
    connection.flags = 0
    connection.ends[1].is_asleep = True
    connection.send(0, 10)


def left_when_it_has_not_read(make: Make) -> None:
    connection = make()
    connection.send(0, 10)
    connection.flags = abi.CONTROL_PAUSED
    connection.send(0, 10)
    connection.settle()


def overtakes_another_thread(make: Make) -> None:
    """One thread's redirect rests on its way, the other's message goes by TCP."""
    connection = make()
    connection.begin(0, 10)
    connection.flags = abi.CONTROL_PAUSED
    connection.begin(0, 10)
    connection.settle()


def with_end(number: int, **what: bool | int) -> Callable[[Make], None]:
    """A message from end 0 after something has become so at one end."""

    def story(make: Make) -> None:
        connection = make()
        assert echo(connection)
        for name, value in what.items():
            setattr(connection.ends[number], name, value)
        echo(connection)

    story.__name__ = f"{'_'.join(what)}_{number}"
    return story


def paused(make: Make) -> None:
    connection = make()
    connection.flags = abi.CONTROL_PAUSED
    echo(connection)


def silent_joiner(make: Make) -> None:
    """It has died. While it lives, messages bypass."""
    connection = make()
    connection.rules.host_beat()
    assert echo(connection)
    for _ in range(11):
        connection.now += REFRESH_NS
        bypassed = any(echo(connection) for _ in range(2))
    if bypassed:
        raise Broken("a message is bypassed to a reader that would get no fresh edge")


def never_by_tcp(make: Make) -> None:
    """Conntrack sees nothing for two seconds."""
    connection = make()
    connection.now += 2 * REFRESH_NS
    echo(connection)


def by_tcp_without_nodelay(connection: Connection) -> None:
    """End 0 sends a message that is not acknowledged: TCP would hold back the next one."""
    connection.ends[0].has_nodelay = False
    assert echo(connection)
    connection.ends[0].is_corked = True
    assert not echo(connection)
    connection.ends[0].is_corked = False


def answered_without_nodelay(make: Make) -> None:
    connection = make()
    assert echo(connection, 1)
    by_tcp_without_nodelay(connection)
    assert not echo(connection, 1)
    assert echo(connection)
    assert echo(connection, 1)


def answered_behind_others(make: Make) -> None:
    connection = make()
    connection.send(1, 10)
    by_tcp_without_nodelay(connection)
    connection.send(1, 10)
    connection.settle()


def options_on_the_way_to_the_bypass(make: Make) -> None:
    connection = make()
    connection.flags = abi.CONTROL_PAUSED
    echo(connection)
    connection.flags = 0
    connection.ends[1].has_options = True
    echo(connection)


def reader_refuses(make: Make) -> None:
    """A member that turns blocking leaves."""
    connection = make()
    connection.ends[1].is_nonblocking = False
    for _ in range(3):
        connection.visit(1)
    if connection.membership(1) != OUT:
        raise Broken("a reader that may sleep in recv stays")


def never_read(make: Make) -> None:
    connection = make()
    for sender in (0, 1):
        for _ in range(40):
            connection.send(sender, 65_536)


def never_answered(make: Make) -> None:
    """A stream, which its reader reads at once."""
    connection = make()
    for _ in range(40):
        connection.send(0, 16_384)
        connection.read_everything(1)


def never_read_in_little_memory(*, of_pod: bool) -> Callable[[Make], None]:
    """A MB is left of the limit of the container, or of the pod."""

    def story(make: Make) -> None:
        connection = make(sidecar=True)
        connection.limit_memory(limit=64, used=63, cached=0, of_pod=of_pod)
        for _ in range(100):
            connection.send(0, 16_384)

    story.__name__ = f"never_read_in_little_memory_of_{'pod' if of_pod else 'container'}"
    return story


def short_of_memory(make: Make) -> None:
    connection = make()
    assert echo(connection)
    connection.run_short()
    echo(connection)


def rests_behind_the_bound(make: Make) -> None:
    """The reader reads what was bypassed, and takes the short read for the end."""
    connection = make()
    while connection.send(0, 65_536):
        pass
    connection.settle()


def rests_on(make: Make) -> None:
    """The same, after a pass that has come too early."""
    connection = make()
    while connection.send(0, 65_536):
        pass
    due_pass(connection, 1)
    connection.settle()


def leaves_behind_the_bound(make: Make) -> None:
    """Its sender has left before the reader gets its new edge."""
    connection = make(pods=2)
    while connection.send(0, 65_536):
        pass
    connection.read_everything(1)
    assert leaves(connection, 0, 4)
    connection.settle()


def closes_behind_the_bound(make: Make) -> None:
    """Its sender has closed before the reader reads."""
    connection = make(pods=2)
    while connection.send(0, 65_536):
        pass
    connection.rules.host_close(0)
    connection.settle()


def closes_and_its_reader_leaves(make: Make) -> None:
    """The reader leaves while it is inside the read that takes the last bypassed bytes."""
    connection = make(pods=2)
    while connection.send(0, 65_536):
        pass
    connection.rules.host_close(0)
    leaves(connection, 1, 2)
    connection.read_everything(1)
    connection.ends[1].is_owned = True
    connection.visit(1)
    assert connection.membership(1) == OUT
    connection.ends[1].is_owned = False
    connection.settle()


def due_pass(connection: Connection, number: int) -> None:
    """A pass over an end's pod, if one is due."""
    if connection.rules.host_begin_pass(number):
        connection.visit(number)


def overtaken_by_tcp(make: Make) -> None:
    """One thread's redirect rests on its way while the other's message goes by TCP: another pod's
    application is inside a call. A pass comes before either arrives."""
    connection = make(pods=2)
    connection.begin(0, 10)
    connection.ends[1].is_owned = True
    connection.begin(0, 10, meanwhile=lambda: due_pass(connection, 1))
    connection.ends[1].is_owned = False
    connection.arrive(0)
    connection.settle()


def leaves_as_it_reads(make: Make) -> None:
    """The same, and its short read is within the visit in which it leaves."""
    for look in LOOKS:
        connection = make()
        while connection.send(0, 65_536):
            pass
        leaves(connection, 1, 2)
        with connection.meanwhile(look, partial(connection.read_everything, 1)):
            connection.visit(1)
        connection.settle()


def joins(connection: Connection) -> None:
    for _ in range(2):
        connection.visit(0)
    if connection.membership(0) != OUT:
        raise Broken("a socket joins that must not")


def out(make: Make) -> Connection:
    """Both have left, and may join again."""
    connection = make()
    assert leaves(connection, 0)
    assert leaves(connection, 1)
    connection.flags = 0
    for sender in (0, 1) * 24:
        echo(connection, sender)
    connection.packet(1)
    return connection


def joins_without_a_joiner(make: Make) -> None:
    """What stands in for it visits, too."""
    connection = out(make)
    connection.rules.host_beat()
    connection.now += 6 * REFRESH_NS
    joins(connection)


def joins_inside_a_call(make: Make) -> None:
    connection = out(make)
    connection.ends[0].is_owned = True
    joins(connection)


def joins_with_a_sleeper(make: Make) -> None:
    connection = out(make)
    connection.ends[0].is_asleep = True
    joins(connection)


def joins_around_a_send(make: Make) -> None:
    """Its bytes go by TCP, behind another thread's that bypass."""
    connection = make()
    assert connection.send(0, 10)
    connection.end_of_an_earlier_send(0, 10)
    connection.read(1, 2**20)
    connection.settle()


def joins_as_another_connection(make: Make) -> None:
    connection = out(make)
    connection.rules.host_renumber(0)
    joins(connection)


def joins_a_stranger(make: Make) -> None:
    connection = out(make)
    connection.rules.host_estrange(1)
    joins(connection)


def joins_beside_another_sockmap(make: Make) -> None:
    connection = out(make)
    connection.rules.host_occupy(0)
    connection.visit(0)
    if connection.rules.host_membership(0) == MEMBER:
        raise Broken("two sockmaps have one socket")


def sleeps_as_it_leaves(make: Make) -> None:
    """A member has turned blocking, and a thread sleeps in recv: it leaves for good."""
    connection = make()
    echo(connection, 1)
    connection.ends[1].is_nonblocking = False
    connection.ends[1].is_waiting = True
    if not leaves(connection, 1):
        raise Broken("it stays as long as the thread sleeps")


def comes_back_with_a_sleeper(make: Make) -> None:
    connection = make()
    connection.ends[1].is_waiting = True
    assert leaves(connection, 1)
    assert leaves(connection, 0)
    connection.ends[1].is_waiting = False
    connection.flags = 0
    for sender in (0, 1) * 24:
        echo(connection, sender)
    connection.packet(0)
    connection.visit(1)
    if connection.membership(1) != OUT:
        raise Broken("it joins again")


def paused_with_a_sleeper(make: Make) -> None:
    connection = make()
    assert echo(connection)
    connection.ends[0].is_waiting = True
    connection.flags = abi.CONTROL_PAUSED
    echo(connection)


def leaves_with_bytes_unread(make: Make) -> None:
    connection = make()
    connection.send(1, 10)
    leaves(connection, 0, 4)


def leaves_before_it_was_read(make: Make) -> None:
    """Its next bytes, by TCP, lie behind those that it has bypassed."""
    connection = make()
    connection.send(0, 10)
    leaves(connection, 0, 4)
    connection.send(0, 10)
    connection.settle()


def leaves_with_a_redirect_on_its_way(make: Make) -> None:
    connection = make()
    connection.begin(1, 10)
    leaves(connection, 0, 4)
    connection.arrive(1)


def leaves_with_an_overtaken_one_on_its_way(make: Make) -> None:
    connection = make(pods=2)
    connection.begin(1, 10)
    connection.ends[0].is_owned = True
    connection.begin(1, 10)
    connection.ends[0].is_owned = False
    connection.read_everything(0)
    leaves(connection, 0, 4)
    connection.arrive(1)


def leaves_as_a_send_is_decided_upon(make: Make) -> None:
    def leave(connection: Connection) -> None:
        if leaves(connection, 0):
            raise Broken("it has left")

    for look in LOOKS:
        connection = make()
        with connection.meanwhile(look, partial(leave, connection)):
            connection.begin(1, 10)
        connection.settle()


def leaves_with_its_own_on_its_way(make: Make) -> None:
    connection = make()
    connection.begin(0, 10)
    leaves(connection, 0, 4)
    leaves(connection, 1, 4)
    connection.arrive(0)


def leaves_as_a_redirect_arrives(make: Make) -> None:
    """It arrives between the looks at the queue and at the threads."""
    for look in LOOKS:
        connection = make()
        connection.begin(1, 10)
        leaves(connection, 0, 2)
        with connection.meanwhile(look, partial(step, connection, "arrive", 1)):
            connection.visit(0)
        connection.settle()


def leaves_as_a_redirect_begins(make: Make) -> None:
    """A send finds bytes unread, its reader reads them, it arrives: all within one visit."""
    for first in LOOKS:
        for second in (1, 2, 3):
            connection = make()
            connection.send(1, 10)
            leaves(connection, 0, 2)
            arrives = partial(step, connection, "arrive", 1)
            begins = partial(step, connection, "begin", 1)
            reads = partial(step, connection, "read", 0)
            later = partial(connection.interrupt, second, arrives)
            with connection.meanwhile(first, begins, reads, later):
                connection.visit(0)
            connection.settle()


def leaves_as_its_own_redirect_begins(make: Make) -> None:
    """Its send finds bytes unread at the peer, which leaves as soon as it has read them."""
    for look in LOOKS:
        connection = make()
        connection.send(0, 10)
        for number in (0, 1) * 2:
            leaves(connection, number, 1)
        with connection.meanwhile(look, partial(step, connection, "begin", 0)):
            connection.visit(0)
        connection.read_everything(1)
        leaves(connection, 1, 4)
        connection.settle()


def redirects_to_the_leaving(make: Make) -> None:
    """Two threads inside a send: neither may take the other for a reason to go on."""
    connection = make()
    connection.begin(1, 10)
    connection.flags = abi.CONTROL_LEAVE
    connection.visit(0)
    assert connection.membership(0) == LEAVING
    connection.begin(1, 10)


BREAKS = [
    (mutants.ORDER, unread_by_tcp),
    (mutants.WAKE_UP, asleep_on_tcp),
    (mutants.RETURN, left_when_it_has_not_read),
    (mutants.OVERTAKING, overtakes_another_thread),
    (mutants.PAUSE, paused),
    (mutants.SLEEPERS, paused_with_a_sleeper),
    (mutants.LOCK, with_end(1, is_owned=True)),
    (mutants.HALF_CLOSED, with_end(1, state=switch.FIN_WAIT2)),
    (mutants.HALF_CLOSED, with_end(0, state=switch.CLOSE_WAIT)),
    (mutants.SILENCE, silent_joiner),
    (mutants.CONNTRACK, never_by_tcp),
    (mutants.CORK, with_end(0, is_corked=True)),
    (mutants.NAGLE, answered_without_nodelay),
    (mutants.NAGLE_WAITS, answered_behind_others),
    (mutants.BLOCKING, with_end(1, is_nonblocking=False)),
    (mutants.OWN_ULP, with_end(0, has_ulp=True)),
    (mutants.PEERS_ULP, with_end(1, has_ulp=True)),
    (mutants.OPTIONS, options_on_the_way_to_the_bypass),
    (mutants.READERS, reader_refuses),
    (mutants.BOUND, never_read),
    (mutants.STREAM, never_answered),
    (mutants.MEMORY, never_read_in_little_memory(of_pod=False)),
    (mutants.MEMORY_OF_POD, never_read_in_little_memory(of_pod=True)),
    (mutants.PRESSURE, short_of_memory),
    (mutants.FRESH_EDGE, rests_behind_the_bound),
    (mutants.EDGE_UNASKED, rests_behind_the_bound),
    (mutants.EDGE_ONCE, rests_on),
    (mutants.EDGE_TOO_EARLY, overtaken_by_tcp),
    (mutants.EDGE_AFTER_LEAVING, leaves_as_it_reads),
    (mutants.EDGE_OF_THE_CLOSED, closes_behind_the_bound),
    (mutants.EDGE_OF_THE_LEFT, closes_and_its_reader_leaves),
    (mutants.EDGE_FORGOTTEN, leaves_behind_the_bound),
    (mutants.EDGE_UNNOTED, joins_around_a_send),
    (mutants.JOINS_UNSERVED, joins_without_a_joiner),
    (mutants.JOINS_OWNED, joins_inside_a_call),
    (mutants.JOINS_SLEEPER, joins_with_a_sleeper),
    (mutants.JOINS_STRANGER, joins_as_another_connection),
    (mutants.JOINS_ALONE, joins_a_stranger),
    (mutants.JOINS_OCCUPIED, joins_beside_another_sockmap),
    (mutants.LEAVES_OPENLY, redirects_to_the_leaving),
    (mutants.LEAVES_PAUSED, redirects_to_the_leaving),
    (mutants.LEAVES_UNREAD, leaves_with_bytes_unread),
    (mutants.LEAVES_UNHEARD, leaves_before_it_was_read),
    (mutants.LEAVES_BLINDLY, leaves_with_a_redirect_on_its_way),
    (mutants.LEAVES_BEHIND, leaves_with_an_overtaken_one_on_its_way),
    (mutants.LEAVES_UNDECIDED, leaves_as_a_send_is_decided_upon),
    (mutants.LEAVES_OWN, leaves_with_its_own_on_its_way),
    (mutants.LEAVES_AWAKE, sleeps_as_it_leaves),
    (mutants.LEAVES_FOR_A_WHILE, comes_back_with_a_sleeper),
    (mutants.LEAVES_AT_ONCE, leaves_as_a_redirect_arrives),
    (mutants.LEAVES_UNCOUNTED, leaves_as_a_redirect_begins),
    (mutants.LEAVES_OWN_UNCOUNTED, leaves_as_its_own_redirect_begins),
]


def name_of(value: object) -> str:
    """A parameter's part of the test's name."""
    return value.rule if isinstance(value, Mutant) else str(getattr(value, "__name__", value))


@pytest.mark.parametrize(("mutant", "story"), BREAKS, ids=name_of)
def test_stories_break_without_their_rule(mutant: Mutant, story: Callable[[Make], None]) -> None:
    story(fresh)
    with pytest.raises(Broken):
        story(partial(fresh, mutant))


# ---- What a peer may have unread ----


def unread(connection: Connection) -> int:
    """Bytes that a peer gets of a sender that goes on, while it reads nothing."""
    connection.flags = abi.CONTROL_PAUSED
    echo(connection)
    connection.flags = 0
    echo(connection, 1)
    return sum(connection.send(0, 1000) for _ in range(200)) * 1000


@pytest.mark.parametrize("of_pod", [False, True])
@pytest.mark.parametrize(
    ("limit", "used", "cached", "room"),
    [
        (64, 56, 0, 4),
        (64, 58, 0, 2),
        (64, 60, 0, 0),
        (64, 64, 6, 0),
        (64, 64, -1, 0),  # statistics may be, for a moment
        (64, 64, 12, 2),
        (4096, 4062, 0, 2),  # no more than 32 MB are nobody's
    ],
)
def test_leaves_a_container_its_memory(
    limit: int, used: int, cached: int, room: int, *, of_pod: bool
) -> None:
    """MB. A 16th of the limit is nobody's; half of the cache is free; a connection takes a 16th."""
    connection = fresh(sidecar=True)
    connection.limit_memory(limit=limit, used=used, cached=cached, of_pod=of_pod)
    most = room * (1 << 20) // 16
    assert most / 3 - LOOK <= unread(connection) <= max(most, LOOK)


def test_leaves_soon_when_memory_is_short() -> None:
    connection = fresh()
    connection.run_short()
    assert unread(connection) == 0


@pytest.mark.parametrize("offered", [0, RCVBUF // 4, RCVBUF * 3 // 4, RCVBUF * 15 // 16])
def test_leaves_a_strict_kernel_what_tcp_has_offered(offered: int) -> None:
    connection = fresh(strict=True, sidecar=True)
    connection.rules.host_offer(1, offered)
    bound = min(RCVBUF // 4, (RCVBUF - offered) // 2)
    each = 1000 + MESSAGE_COST
    sent = unread(connection) // 1000 * each
    assert sent <= bound
    assert sent > bound - 2 * each or bound <= LOOK
    assert sent < BOUND
