# SPDX-License-Identifier: Apache-2.0
"""Behind a Service's address the client cannot know its server: its pod vouches for itself."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from bpf import abi
from tests import light
from tests.fuzz.mutants import Edit
from tests.integration import traffic_pods
from tests.integration.test_identity import Attack
from tests.integration.traffic_pods import (
    LightNode,
    LightPod,
    accepted,
    bypassed,
    connected,
    eventually,
    exchange,
    outcomes,
)

A, B, C = "10.9.0.1", "10.9.0.2", "10.9.0.3"
SERVICE = ("10.9.200.1", 80)
OTHER_TOKEN = Edit(r"half->token == tb_token\(", "half->token + 1 == tb_token(")
OPTION = b"\xfd\x0ctb"  # kind, length and ID of struct tb_option


@pytest.fixture(scope="module")
def node() -> Iterator[LightNode]:
    with traffic_pods.node() as made:
        yield made


@contextmanager
def pods(
    node: LightNode, *flags: int, accelerated: tuple[bool, bool] = (True, True)
) -> Iterator[tuple[LightPod, LightPod]]:
    """A client whose namespace translates the Service's address into the server's, and that."""
    with ExitStack() as stack:
        client, server = (
            stack.enter_context(node.pod(ip, flags=flag, accelerated=each))
            for ip, flag, each in zip((A, B), flags, accelerated)
        )
        translated(client)
        yield client, server


def translated(client: LightPod) -> None:
    address, port = SERVICE
    client.command(
        f"iptables -t nat -A OUTPUT -d {address} -p tcp --dport {port} "
        f"-j DNAT --to-destination {B}:8080"
    )


def talk(client: LightPod, server: LightPod) -> None:
    with connected(client, server, to=SERVICE) as (ours, theirs):
        exchange(ours, theirs)


def test_through_a_service(node: LightNode) -> None:
    with pods(node, abi.POD_SERVICES, abi.POD_SERVICES) as (client, server):
        talk(client, server)
        assert eventually(lambda: bypassed(client, server) > 0)
        assert outcomes(client, server) == {"paired": 2}


@pytest.mark.parametrize("flags", [(0, abi.POD_SERVICES), (abi.POD_SERVICES, 0), (0, 0)])
def test_both_pods_must_do_it(node: LightNode, flags: tuple[int, int]) -> None:
    with pods(node, *flags) as (client, server):
        talk(client, server)
        assert outcomes(server) == {"mismatch": 1}
        assert bypassed(client, server) == 0


def test_a_listener_from_before_the_add(node: LightNode) -> None:
    """It was never asked to vouch: its connections stay on TCP."""
    with pods(node, abi.POD_SERVICES, abi.POD_SERVICES, accelerated=(True, False)) as both:
        client, server = both
        with server.listen() as listener:
            server.attach()
            with client.connect(SERVICE) as ours, accepted(listener) as theirs:
                exchange(ours, theirs)
        assert outcomes(server) == {"mismatch": 1}
        assert bypassed(client, server) == 0


def test_a_token_that_does_not_fit_is_not_believed() -> None:
    """The programs expect another one than they make, as if a forger had guessed."""
    with (
        light.source_edited(OTHER_TOKEN.apply),
        traffic_pods.node() as strange,
        pods(strange, abi.POD_SERVICES, abi.POD_SERVICES) as (client, server),
    ):
        talk(client, server)
        assert outcomes(server) == {"mismatch": 1}
        assert bypassed(client, server) == 0


def test_a_pod_that_knows_everything_but_the_token(node: LightNode) -> None:
    """As in test_identity.py, but the address dialled is nobody's."""
    with (
        pods(node, abi.POD_SERVICES, abi.POD_SERVICES) as (victim, server),
        node.pod(C, flags=abi.POD_SERVICES) as attacker,
        server.listen() as listener,
    ):
        attack = Attack(victim, server, attacker, listener, SERVICE)
        attack.assert_nothing_is_heard()
        assert outcomes(attacker) == {"mismatch": 1}


@pytest.mark.parametrize("accelerated", [True, False], ids=["accelerated", "stranger"])
def test_only_accelerated_pods_of_this_node_get_to_see_the_option(
    node: LightNode, accelerated: bool
) -> None:
    flags = (abi.POD_SERVICES, abi.POD_SERVICES)
    with pods(node, *flags, accelerated=(accelerated, True)) as (client, server):
        sniffer = client.new_socket(uid=0, family=socket.AF_PACKET, kind=socket.SOCK_DGRAM)
        with sniffer, client.netns.entered():
            sniffer.bind(("eth0", 0x0800))
            sniffer.setblocking(False)
            talk(client, server)
            packets = list(received(sniffer))
    answers = [packet for packet in packets if packet[33] & 0x12 == 0x12]  # SYN and ACK
    assert answers
    assert any(OPTION in packet for packet in packets) == accelerated
    assert all((OPTION in packet) == accelerated for packet in answers)


def received(sniffer: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            packet, address = sniffer.recvfrom(4096)
        except BlockingIOError:
            return
        if packet[9] == socket.IPPROTO_TCP and address[2] == socket.PACKET_HOST:
            yield packet
