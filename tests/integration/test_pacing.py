# SPDX-License-Identifier: Apache-2.0
"""Congestion control that paces, inside a pod and elsewhere: see tb_pace_not()."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bpf.loader import Limits
from tests.bed import congestion
from tests.integration import traffic_pods
from tests.integration.traffic_pods import (
    LightNode,
    LightPod,
    accepted,
    connected,
    disconnect,
    eventually,
    exchange,
    outcomes,
    receive,
    send_by_tcp,
)

A, B, C = "10.9.0.1", "10.9.0.2", "10.9.0.3"
BBR, RENO, OTHER = "bbr", "reno", "cubic"
BULK = 256 << 10  # bytes


@pytest.fixture(scope="module", autouse=True)
def every_namespace_may_choose_it() -> Iterator[None]:
    with congestion.allowed(BBR):
        yield


@pytest.fixture(scope="module")
def node() -> Iterator[LightNode]:
    with traffic_pods.node() as made:
        yield made


@contextmanager
def paced_pod(node: LightNode, ip: str) -> Iterator[LightPod]:
    """One whose sockets have BBR, unless they ask for another."""
    with node.pod(ip) as made:
        congestion.choose(made.netns, BBR)
        yield made


@pytest.fixture
def pod(node: LightNode) -> Iterator[LightPod]:
    with paced_pod(node, A) as made:
        yield made


def choose(sock: socket.socket, name: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def chosen(*socks: socket.socket) -> list[str]:
    """What getsockopt(TCP_CONGESTION) says of each."""
    options = [sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16) for sock in socks]
    return [option.partition(b"\0")[0].decode() for option in options]


def by_tcp(sender: socket.socket, reader: socket.socket, size: int = 1000) -> None:
    send_by_tcp(sender, bytes(size))
    assert receive(reader, size) == bytes(size)


@pytest.mark.parametrize("to", [A, "127.0.0.1"])
def test_inside_a_pod_reno_stands_in_for_it(pod: LightPod, to: str) -> None:
    with connected(pod, pod, to=(to, 8080)) as ends:
        assert chosen(*ends) == [RENO, RENO]
        assert exchange(*ends)
        by_tcp(*ends)
        assert chosen(*ends) == [RENO, RENO]


def test_between_pods_it_stays(node: LightNode, pod: LightPod) -> None:
    with paced_pod(node, B) as other, connected(pod, other) as ends:
        assert chosen(*ends) == [BBR, BBR]


def test_one_that_does_not_pace_stays(pod: LightPod) -> None:
    with congestion.allowed(OTHER):
        congestion.choose(pod.netns, OTHER)
        with connected(pod, pod) as ends:
            assert chosen(*ends) == [OTHER, OTHER]


def test_what_an_application_chose_stays(pod: LightPod) -> None:
    with pod.listen() as listener, pod.new_socket() as client:
        choose(client, BBR)
        client.connect((A, 8080))
        with accepted(listener) as server:
            assert chosen(client, server) == [BBR, RENO]
        choose(listener, BBR)
        with pod.connect((A, 8080)) as another, accepted(listener) as server:
            assert chosen(another, server) == [RENO, BBR]


def test_the_send_buffers_are_as_large(node: LightNode, pod: LightPod) -> None:
    """The kernel makes them by the congestion control; who writes before it reads counts on it."""

    def buffers(each: LightPod) -> list[int]:
        with connected(each, each) as ends:
            return [sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) for sock in ends]

    with node.pod(C, accelerated=False) as plain:
        congestion.choose(plain.netns, BBR)
        assert buffers(pod) == buffers(plain)


def test_where_the_window_begins_large_it_stays(pod: LightPod) -> None:
    """One that could not be held."""
    pod.command(f"ip route change table local local {A} dev eth0 initcwnd 20")
    with connected(pod, pod) as ends:
        assert chosen(*ends) == [BBR, BBR]


def test_while_paused_it_stays(node: LightNode, pod: LightPod) -> None:
    with node.paused(), connected(pod, pod) as ends:
        assert chosen(*ends) == [BBR, BBR]


def test_the_pause_brings_it_back_for_good(node: LightNode, pod: LightPod) -> None:
    with connected(pod, pod) as ends:
        with node.paused():
            assert exchange(*ends)
            assert exchange(*ends)
            assert chosen(*ends) == [BBR, BBR]
        assert exchange(*ends)
        by_tcp(*ends)
        assert chosen(*ends) == [BBR, BBR]


def test_it_does_not_take_the_place_of_what_was_chosen_meanwhile(
    node: LightNode, pod: LightPod
) -> None:
    with connected(pod, pod) as ends, node.paused():
        choose(ends[0], OTHER)
        assert exchange(*ends)
        assert exchange(*ends)
        assert chosen(*ends) == [OTHER, BBR]


def test_a_reader_that_wants_many_bytes_at_once_brings_it_back(pod: LightPod) -> None:
    with connected(pod, pod) as (sender, reader):
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1000)
        by_tcp(sender, reader)
        assert chosen(sender, reader) == [BBR, RENO]


def test_a_socket_that_is_used_again_has_it(node: LightNode, pod: LightPod) -> None:
    with node.pod(C, accelerated=False) as elsewhere, connected(pod, pod) as (sender, _):
        disconnect(sender)
        with elsewhere.listen(8081) as listener:
            sender.connect((C, 8081))
            with accepted(listener) as taken:
                assert exchange(sender, taken)
                assert chosen(sender) == [BBR]


def test_a_client_without_a_server_has_it() -> None:
    """There is room for one socket, and the client comes first."""
    with (
        traffic_pods.node(Limits(sockets=1, pending=64, counters=64)) as node,
        paced_pod(node, A) as pod,
        connected(pod, pod) as ends,
    ):
        assert exchange(*ends)
        assert chosen(*ends) == [BBR, BBR]
        assert outcomes(pod) == {"full": 1, "no_peer": 1}
        assert node.sockets() == 0


def test_a_client_whose_offer_was_dropped_has_it(node: LightNode, pod: LightPod) -> None:
    """As the LRU map does, when there are many; its server is told of it by nobody."""
    with connected(pod, pod) as ends:
        node.forget_halves()
        by_tcp(*ends)
        assert chosen(*ends) == [BBR, RENO]


def streamed(sender: socket.socket, reader: socket.socket, write: int, writes: int = 2048) -> None:
    """A stream of such writes, of which hardly two share an acknowledgement: see TB_FINE_ACKS."""
    for _ in range(writes):
        sender.sendall(bytes(write))
        assert receive(reader, write) == bytes(write)


def test_in_the_sockhash_small_writes_of_their_own_change_nothing(
    node: LightNode, pod: LightPod
) -> None:
    with connected(pod, pod) as ends:
        for _ in range(1024):
            by_tcp(*ends, 1)
        assert chosen(*ends) == [RENO, RENO]
        assert node.sockets() == 2


def test_many_that_the_order_rule_keeps_on_tcp_bring_it_back(
    node: LightNode, pod: LightPod
) -> None:
    """See TB_FINE_WAITS."""
    with connected(pod, pod) as (sender, reader):
        reader.setblocking(True)
        by_tcp(sender, reader)
        streamed(sender, reader, 100, writes=250)
        assert chosen(sender) == [RENO]
        streamed(sender, reader, 100, writes=20)
        assert chosen(sender, reader) == [BBR, RENO]
        assert node.sockets() == 2


def test_those_between_large_ones_do_not(node: LightNode, pod: LightPod) -> None:
    """Records of a short header and a long body."""
    with connected(pod, pod) as (sender, reader):
        reader.setblocking(True)
        by_tcp(sender, reader)
        for _ in range(300):
            streamed(sender, reader, 60_000, writes=1)
            streamed(sender, reader, 100, writes=1)
        assert chosen(sender) == [RENO]
        assert node.sockets() == 2


def test_one_that_leaves_with_small_writes_has_it_at_once(node: LightNode, pod: LightPod) -> None:
    """They were bypassed, so that the order rule has not kept any."""
    with connected(pod, pod) as (sender, reader):

        def has_left() -> bool:
            streamed(sender, reader, 100, writes=1)
            return node.sockets() == 0

        for _ in range(400):
            sender.sendall(bytes(100))
        assert receive(reader, 40_000) == bytes(40_000)
        assert chosen(sender) == [RENO]
        assert eventually(has_left)

        def has_it() -> bool:
            by_tcp(sender, reader)
            return chosen(sender, reader) == [BBR, RENO]

        assert eventually(has_it)


@pytest.mark.parametrize("crowd", [0, 400])
def test_one_that_leaves_with_large_writes_has_it_for_small_ones(
    node: LightNode, pod: LightPod, crowd: int
) -> None:
    """Nobody sees them there but for what is acknowledged; and it stays then."""
    with connected(pod, pod) as (sender, reader):
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        reader.setblocking(True)
        for _ in range(crowd):  # bypassed, long before
            sender.sendall(bytes(100))
        assert receive(reader, crowd * 100) == bytes(crowd * 100)
        by_tcp(sender, reader)

        def has_left() -> bool:
            streamed(sender, reader, BULK, writes=16)
            return node.sockets() == 0

        assert eventually(has_left)
        streamed(sender, reader, BULK)
        assert chosen(sender) == [RENO]
        streamed(sender, reader, 100)
        assert chosen(sender) == [BBR]
        streamed(sender, reader, BULK)
        streamed(reader, sender, BULK)
        assert chosen(sender, reader) == [BBR, RENO]
        streamed(reader, sender, 100)
        assert chosen(reader) == [BBR]
