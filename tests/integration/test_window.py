# SPDX-License-Identifier: Apache-2.0
"""TCP's congestion window, inside a pod and elsewhere: see tb_best_window()."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from cni_plugin import names
from tests.bed import congestion
from tests.integration import traffic_pods
from tests.integration.traffic_pods import (
    SO_MAX_PACING_RATE,
    LightNode,
    LightPod,
    accepted,
    connected,
    disconnect,
    eventually,
    exchange,
    receive,
    send_by_tcp,
    without_pacing,
)

A, B, C = "10.9.0.1", "10.9.0.2", "10.9.0.3"
PROXY_PORT, SERVICE = 15001, ("10.96.0.1", 80)
NO_THRESHOLD = 0x7FFFFFFF  # TCP_INFINITE_SSTHRESH: nothing has told TCP where its window ends
FEW_PACKETS, IN_FLIGHT = 16, 512 << 10  # TB_FEW_PACKETS, TB_IN_FLIGHT
MANY_PACKETS, WAITS = 256, 64  # TB_MANY_PACKETS, TB_WAITS
TRIES = 10  # connections
Ends = tuple[socket.socket, socket.socket]
SMALL, BULK = 1000, 256 << 10  # bytes
LO, WIRE = 16_384, 1460  # what a packet holds: more than the one, no more than the other


@dataclass(frozen=True)
class Window:
    """What getsockopt(TCP_INFO) says of it; in packets, but for `packet`, which is in bytes."""

    packet: int
    threshold: int
    window: int

    @classmethod
    def of(cls, sock: socket.socket) -> Window:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 84)
        at = {"packet": 16, "threshold": 76, "window": 80}  # struct tcp_info, linux/tcp.h
        return cls(**{k: int.from_bytes(info[v : v + 4], sys.byteorder) for k, v in at.items()})


@pytest.fixture(scope="module")
def node() -> Iterator[LightNode]:
    with traffic_pods.node() as made:
        yield made


@pytest.fixture
def pod(node: LightNode) -> Iterator[LightPod]:
    with node.pod(A) as made:
        without_pacing(made)
        yield made


def by_tcp(sender: socket.socket, reader: socket.socket, write: int, *, burst: int = 0) -> Window:
    """Writes by TCP, some of them before each read; the window that they leave.

    With eight packets on their way no window grows beyond 16; and BBR would come back to some more
    small writes, see test_pacing.py.
    """
    burst = burst or (8 if write == SMALL else 1)
    sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    assert exchange(sender, reader)
    data = os.urandom(write)
    for _ in range(25):
        for _ in range(burst):
            send_by_tcp(sender, data)
        assert receive(reader, burst * write) == burst * data
    assert exchange(sender, reader)
    return Window.of(sender)


@contextmanager
def held(
    pod: LightPod, to: str = A, *, backwards: bool = False, write: int = SMALL
) -> Iterator[Ends]:
    """A connection's ends, (sender, reader), whose window is held.

    Where others use the CPUs an acknowledgement may be late, and the window is wider: then the next
    connection.
    """
    with ExitStack() as stack:
        for _ in range(TRIES):
            client, server = stack.enter_context(connected(pod, pod, to=(to, 8080)))
            sender, reader = (server, client) if backwards else (client, server)
            window = by_tcp(sender, reader, write)
            assert window.packet > LO
            if window.threshold == FEW_PACKETS:
                assert window.window <= FEW_PACKETS
                yield sender, reader
                return
        pytest.fail(f"{window} after {TRIES} connections")


@pytest.mark.parametrize("write", [SMALL, BULK])
@pytest.mark.parametrize("backwards", [False, True])
def test_few_packets_are_on_their_way_over_lo(
    pod: LightPod, write: int, *, backwards: bool
) -> None:
    with held(pod, "127.0.0.1", backwards=backwards, write=write) as (sender, reader):
        assert exchange(sender, reader)


@pytest.mark.parametrize(
    ("control", "write", "is_held"),
    [("reno", SMALL, True), ("reno", BULK, False), ("bbr", SMALL, True), ("bbr", BULK, True)],
)
def test_a_window_of_small_packets_is_held_for_small_writes(
    pod: LightPod, control: str, write: int, *, is_held: bool
) -> None:
    """Towards the sidecar a packet is as small as towards the address that was dialled. And for
    all where another stands in for BBR, which must not find it grown when it comes back."""
    with congestion.allowed(control):
        congestion.choose(pod.netns, control)
    pod.command(f"iptables -t nat -A OUTPUT -d {SERVICE[0]} -p tcp -j REDIRECT --to-ports 15001")

    def window() -> Window:
        with pod.connect(SERVICE) as app, accepted(envoy) as taken:
            return by_tcp(app, taken, write)

    with pod.listen(PROXY_PORT, uid=names.PROXY_UID) as envoy:
        found = [window() for _ in range(TRIES)]
    assert all(each.packet <= WIRE for each in found)
    assert any(each.threshold == IN_FLIGHT // each.packet for each in found) is is_held


def test_between_pods_it_is_left_alone(node: LightNode, pod: LightPod) -> None:
    with node.pod(B) as other, connected(pod, other) as (sender, reader):
        assert by_tcp(sender, reader, SMALL).threshold == NO_THRESHOLD


def test_a_paced_one_is_left_alone(pod: LightPod) -> None:
    with connected(pod, pod) as (sender, reader):
        sender.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 2**31 - 1)
        assert by_tcp(sender, reader, SMALL).threshold == NO_THRESHOLD


def test_a_socket_that_is_used_again_has_its_own(node: LightNode, pod: LightPod) -> None:
    with node.pod(C, accelerated=False) as elsewhere, held(pod) as (sender, _):
        disconnect(sender)
        with elsewhere.listen(8081) as listener:
            sender.connect((C, 8081))
            with accepted(listener) as taken:
                window = by_tcp(sender, taken, BULK)
    assert window.threshold == NO_THRESHOLD
    assert window.window > FEW_PACKETS


def test_the_pause_lifts_it_for_good(node: LightNode, pod: LightPod) -> None:
    with held(pod) as (sender, reader):
        with node.paused():
            assert exchange(sender, reader)
            assert exchange(sender, reader)
        assert Window.of(sender).window <= FEW_PACKETS  # so this does not keep it from being held
        assert by_tcp(sender, reader, SMALL).threshold == NO_THRESHOLD


def test_one_that_has_grown_is_left_alone(node: LightNode, pod: LightPod) -> None:
    """It would not shrink, and nothing would gather."""
    with connected(pod, pod) as (sender, reader):
        with node.paused():
            grown = by_tcp(sender, reader, SMALL, burst=64).window
        assert grown > FEW_PACKETS
        assert by_tcp(sender, reader, SMALL).threshold == NO_THRESHOLD


def waited_for(sender: socket.socket, reader: socket.socket, writes: int) -> None:
    """A message in so many writes, and a reader that takes nothing before it has all of it."""
    message = os.urandom(16 * writes)
    for start in range(0, len(message), 16):
        send_by_tcp(sender, message[start : start + 16])
    assert eventually(lambda: reader.recv(len(message), socket.MSG_PEEK) == message)
    assert receive(reader, len(message)) == message


@pytest.fixture(params=[1, 0], ids=["SACK", "no SACK"])
def sack(pod: LightPod, request: pytest.FixtureRequest) -> None:
    """Without it TCP does not probe for a loss: what waits, waits for the acknowledgement."""
    pod.sysctl("net.ipv4.tcp_sack", request.param)


@pytest.mark.usefixtures("sack")
def test_a_reader_that_waits_for_more_than_it_holds_widens_it(pod: LightPod) -> None:
    """Else it would get each such message as late as a probe for a loss, or an acknowledgement."""
    with held(pod) as (sender, reader):
        for _ in range(8):
            waited_for(sender, reader, 5 * FEW_PACKETS)
            for _ in range(10):  # quick ones, in which the slow one must not be forgotten
                send_by_tcp(sender, b"x")
                assert receive(reader, 1) == b"x"
        assert 5 * FEW_PACKETS < Window.of(sender).threshold <= MANY_PACKETS


@pytest.mark.usefixtures("sack")
@pytest.mark.parametrize(("between", "is_lifted"), [(0, True), (16 << 20, False)])
def test_one_that_waits_for_more_than_it_ever_holds(
    pod: LightPod, between: int, *, is_lifted: bool
) -> None:
    """It ends. A stream whose reader has no CPU now and then looks alike, but for what it moves:
    in a window without an end it would not gather any more."""
    with held(pod) as (sender, reader):
        for _ in range(WAITS * 5 // 4):
            waited_for(sender, reader, 2 * MANY_PACKETS)
            for _ in range(between // BULK):
                send_by_tcp(sender, bytes(BULK))
                assert receive(reader, BULK) == bytes(BULK)
        assert (Window.of(sender).threshold == NO_THRESHOLD) is is_lifted


def test_a_late_reader_of_what_is_there_changes_nothing(pod: LightPod) -> None:
    """The acknowledgement is late, but the window did not hold anything back."""
    with held(pod) as (sender, reader):
        for _ in range(12):
            send_by_tcp(sender, b"x")
            time.sleep(0.05)  # longer than the acknowledgement's delay
            assert receive(reader, 1) == b"x"
        assert Window.of(sender).threshold == FEW_PACKETS


def test_a_reader_that_wants_many_bytes_at_once_ends_it(pod: LightPod) -> None:
    with held(pod) as (sender, reader):
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1000)
        send_by_tcp(sender, bytes(1000))
        assert receive(reader, 1000) == bytes(1000)
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        assert by_tcp(sender, reader, SMALL).threshold == NO_THRESHOLD
