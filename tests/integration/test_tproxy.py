# SPDX-License-Identifier: Apache-2.0
"""Istio's interception mode TPROXY: the application sees its client's own address."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from tests.bed import APP_UID, Bed, Pod, addresses, cni, envoy, fetch, mesh, open_bed, pingpong
from tests.bed.addresses import Family
from tests.bed.envoy import Sidecar
from tests.bed.istio import Interception
from tests.bed.pingpong import APP_PORT, SERVICE_PORT
from tests.integration import reach, traffic_pods
from tests.integration.traffic_pods import LightNode, Maker, eventually

CONNECTIONS = 20
TIMES = 10
SIZES = (1, 1448, 65_537)
FILES = {f"body-{size}": fetch.pattern(size) for size in SIZES}


class Tproxy(NamedTuple):
    bed: Bed
    maker: Maker
    client: Pod
    server: Pod


@pytest.fixture(scope="module")
def pods() -> Iterator[Tproxy]:
    with ExitStack() as stack:
        bed = stack.enter_context(open_bed(subnets=cni.DUAL_STACK))
        client, server = (
            stack.enter_context(bed.pod(name, interception=Interception("TPROXY")))
            for name in ("client", "server")
        )
        yield Tproxy(bed, stack.enter_context(traffic_pods.socket_maker()), client, server)


@pytest.mark.parametrize("family", addresses.FAMILIES)
def test_between_the_sidecars(pods: Tproxy, family: Family) -> None:
    """The sidecar is root there, and to the programs an application like any other."""
    bed, maker, client, server = pods
    hop = pingpong.hop("sidecars", client, server, family)
    reach.exchanged(bed, maker, hop).assert_bypassed("direct")


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_connections_through_real_sidecars(pods: Tproxy, family: Family) -> None:
    """Envoy's own connections come from the client's address in the server's namespace: the very
    address under which the client's pod is known."""
    bed, maker, client, server = pods
    sidecar = Sidecar(endpoint=server.address(family), protocol="tcp")
    hop = pingpong.hop("inbound", client, server, family)
    with (
        envoy.running(client, sidecar),
        envoy.running(server, Sidecar(endpoint=None, protocol="tcp")),
        reach.listening(maker, hop) as listener,
        ExitStack() as stack,
    ):
        before = {pod: pairs(bed, pod) for pod in (client, server)}
        ends = []
        for _ in range(CONNECTIONS):
            kind = socket.AF_INET6 if family == "v6" else socket.AF_INET
            ours = stack.enter_context(maker.make(client, APP_UID, kind))
            ours.connect((addresses.OF[family].service, SERVICE_PORT))
            theirs = stack.enter_context(traffic_pods.accepted(listener))
            assert theirs.getpeername()[0] == client.address(family)
            assert theirs.getsockname()[:2] == (server.address(family), APP_PORT)
            ends.append((ours, theirs))
        wanted = {"local": 2 * CONNECTIONS, "direct": CONNECTIONS}
        for _ in range(10):  # on a busy machine ends find each other later
            traffic_pods.talk_all(ends, rounds=20)
            found = [pairs(bed, pod) - before[pod] for pod in (client, server)]
            if found == [wanted, wanted]:
                break
    assert found == [wanted, wanted]


def pairs(bed: Bed, pod: Pod) -> Counter[str]:
    """Ends of this pod that found their other end, by hop."""
    hops = reach.counted(bed, pod).items()
    return Counter({hop: counters.connections.get("paired", 0) for hop, counters in hops})


def test_a_mesh_of_envoys(pods: Tproxy) -> None:
    bed, _, client, server = pods
    before = reach.counted(bed, client, server)
    with mesh.running(client, server, FILES):
        assert client.run(mesh.fetch_argv(SIZES, TIMES)) == mesh.fetched(SIZES, TIMES)
    after = reach.counted(bed, client, server)
    for hop, bodies in {"local": 2, "direct": 1}.items():  # each body goes over two hops in a pod
        bypassed = after[hop].since(before[hop]).bypassed_bytes
        assert bypassed > bodies * TIMES * sum(SIZES)


# ---- Whose address it is -----------------------------------------------------------------------

A, B, C = "10.9.0.1", "10.9.0.2", "10.9.0.3"


@pytest.fixture(scope="module")
def light() -> Iterator[LightNode]:
    with traffic_pods.node() as made:
        yield made


def test_the_same_address_in_its_own_pod_and_in_a_proxys(light: LightNode) -> None:
    """The same client address and port, at the same time, in three namespaces."""
    with (
        light.pod(A) as owner,
        light.pod(B) as left,
        light.pod(C) as right,
        left.listen() as left_listener,
        right.listen() as right_listener,
        ExitStack() as stack,
    ):
        ends = []
        for pod, listener in ((left, left_listener), (right, right_listener)):
            pod.command(f"ip address add {A}/32 dev lo")  # as good as IP_TRANSPARENT and its routes
            ours = stack.enter_context(pod.connect((pod.ip, 8080), source=(A, 40_000)))
            ends.append((ours, stack.enter_context(traffic_pods.accepted(listener))))
            assert ends[-1][1].getpeername() == (A, 40_000)
        with owner.listen() as listener:
            ours = stack.enter_context(owner.connect((A, 8080), source=(A, 40_000)))
            ends.append((ours, stack.enter_context(traffic_pods.accepted(listener))))
        traffic_pods.talk_all(ends, rounds=20)
        for pod in (owner, left, right):
            assert eventually(lambda: traffic_pods.outcomes(pod) == {"paired": 2})  # noqa: B023


def test_somebody_elses_address_from_another_namespace_stays_on_tcp(light: LightNode) -> None:
    """An impostor on the network, who has the address of a pod that is gone from it."""
    with (
        light.pod(A, wired=False),
        light.pod(B, wired=False) as impostor,
        light.pod(C, wired=False) as server,
    ):
        light.wire(impostor, server)
        impostor.command(f"ip address add {A}/16 dev eth0")
        with (
            server.listen() as listener,
            impostor.connect((C, 8080), source=(A, 40_000)) as ours,
            traffic_pods.accepted(listener) as theirs,
        ):
            traffic_pods.exchange(ours, theirs, rounds=traffic_pods.SEEKING)
        assert eventually(lambda: traffic_pods.outcomes(impostor) == {"no_peer": 1})
        assert traffic_pods.bypassed(impostor, server) == 0
