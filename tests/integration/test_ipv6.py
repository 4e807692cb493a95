# SPDX-License-Identifier: Apache-2.0
"""IPv6 and dual stack: every hop and pairing of families, with pods as real plugins make them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal, NamedTuple

import pytest

from bpf.stats import HopCounters
from tests.bed import PROXY_UID, Bed, Pod, cni, fetch, mesh, open_bed, pingpong
from tests.bed.addresses import FAMILIES, Family
from tests.bed.envoy import Sidecar
from tests.bed.pingpong import HOPS, HopName
from tests.integration import reach, traffic_pods
from tests.integration.traffic_pods import Maker

SIZES = (1, 1448, 65_537)
FILES = {f"body-{size}": fetch.pattern(size) for size in SIZES}
TIMES = 10
TWO_OF_EACH = ("10.246.0.0/16", "10.247.0.0/16", "fd00:10:246::/64", "fd00:10:247::/64")


class Mesh(NamedTuple):
    bed: Bed
    maker: Maker
    client: Pod
    server: Pod


@pytest.fixture(scope="module")
def dual() -> Iterator[Mesh]:
    with ExitStack() as stack:
        bed = stack.enter_context(open_bed(subnets=cni.DUAL_STACK))
        client, server = (stack.enter_context(bed.pod(name)) for name in ("client", "server"))
        yield Mesh(bed, stack.enter_context(traffic_pods.socket_maker()), client, server)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", HOPS)
def test_every_hop(dual: Mesh, name: HopName, family: Family) -> None:
    bed, maker, client, server = dual
    hop = pingpong.hop(name, client, server, family)
    reach.exchanged(bed, maker, hop).assert_bypassed(name)


@pytest.mark.parametrize("name", HOPS)
@pytest.mark.parametrize(("family", "listen"), [("v4", "::"), ("mapped", "0.0.0.0")])
def test_a_socket_of_one_family_and_a_peer_of_the_other(
    dual: Mesh, name: HopName, family: Family, listen: str
) -> None:
    """An IPv4 client and a listener on [::], and the other way round."""
    bed, maker, client, server = dual
    hop = replace(pingpong.hop(name, client, server, family), listen=listen)
    reach.exchanged(bed, maker, hop).assert_bypassed(name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loopback_within_a_pod(dual: Mesh, family: Family) -> None:
    bed, maker, client, server = dual
    hop = pingpong.hop("local", client, server, family)
    reach.exchanged(bed, maker, hop).assert_bypassed("local")


@pytest.mark.parametrize("protocol", ["http", "tcp"])
@pytest.mark.parametrize(("asks", "family"), [("v6", "v6"), ("mapped", "v4"), ("v4", "v6")])
def test_a_mesh_of_envoys(
    dual: Mesh, asks: Family, family: Family, protocol: Literal["http", "tcp"]
) -> None:
    """The application speaks one family to the service, the sidecars the same or another."""
    bed, _, client, server = dual
    argv = mesh.fetch_argv(SIZES, TIMES, mesh.service_url(asks))
    sidecar = Sidecar(endpoint=None, protocol=protocol)
    before = reach.counted(bed, client, server)
    with mesh.running(client, server, FILES, sidecar=sidecar, family=family):
        assert client.run(argv) == mesh.fetched(SIZES, TIMES)
    after = reach.counted(bed, client, server)  # complete, now that the connections are closed
    for hop in HOPS:
        counted = after[hop].since(before.get(hop, HopCounters()))
        assert counted.bypassed_bytes > TIMES * sum(SIZES)
        assert counted.tcp_bytes < counted.bypassed_bytes / 2


def test_pods_with_several_addresses_of_each_family(dual: Mesh) -> None:
    """REDIRECT may hand a connection to another address of the pod than the client dialled."""
    bed = dual.bed.network("several", cni.ptp(dual.bed.ipam, TWO_OF_EACH))
    with (
        bed.pod("several-1") as client,
        bed.pod("several-2") as server,
        reach.visited(dual.maker),
    ):
        assert len(client.ips) == len(TWO_OF_EACH)
        (known,) = (pod["ips"] for pod in bed.node.status()["pods"] if pod["name"] == "several-2")
        assert {*known} == {*server.ips}
        for ip in server.ips:
            for name in ("sidecars", "inbound"):
                family: Family = "v6" if ":" in ip else "v4"
                hop = replace(pingpong.hop(name, client, server, family), destination=ip)
                reach.exchanged(bed, dual.maker, hop).assert_bypassed(name)
        for source in client.ips:  # and from each of them
            family = "v6" if ":" in source else "v4"
            hop = replace(pingpong.hop("sidecars", client, server, family), source=source)
            reach.exchanged(bed, dual.maker, hop).assert_bypassed("sidecars")


def test_pods_without_ipv4(dual: Mesh) -> None:
    primary = cni.bridge(dual.bed.ipam, ("fd00:10:245::/64",), name="cni6")
    bed = dual.bed.network("ipv6-only", primary)
    with (
        bed.pod("ipv6-1") as client,
        bed.pod("ipv6-2") as server,
        reach.visited(dual.maker),
    ):
        assert client.families == ("v6",)
        for name in HOPS:
            hop = pingpong.hop(name, client, server, "v6")
            reach.exchanged(bed, dual.maker, hop).assert_bypassed(name)


def link_local(pod: Pod) -> tuple[str, int]:
    """The pod's fe80 address and the number of its interface."""
    with pod.netns.entered():
        for line in open("/proc/thread-self/net/if_inet6"):  # noqa: PTH123, SIM115
            packed, index, _, _, _, name = line.split()
            if packed.startswith("fe80") and name == pod.attachment.ifname:
                return socket.inet_ntop(socket.AF_INET6, bytes.fromhex(packed)), int(index, 16)
    raise LookupError(f"pod {pod.name} has no link-local address")


def test_link_local_addresses_stay_on_tcp(dual: Mesh) -> None:
    """They are in nobody's record: any pod may have the same."""
    bed, maker, client, server = dual
    target, _ = link_local(server)
    _, scope = link_local(client)
    before = reach.total(bed, client, server)
    hop = pingpong.hop("sidecars", client, server, "v6")
    with (
        reach.listening(maker, hop) as listener,
        maker.make(client, PROXY_UID, socket.AF_INET6) as ours,
    ):
        ours.connect((target, 8080, 0, scope))
        with traffic_pods.accepted(listener) as theirs:
            assert theirs.getpeername()[0].startswith("fe80")
            traffic_pods.exchange(ours, theirs, rounds=reach.SEEKING)
    after = reach.total(bed, client, server).since(before)
    assert after.bypassed_bytes == 0
    assert after.connections.get("paired", 0) == 0
    assert after.connections.get("no_peer", 0) + after.connections.get("mismatch", 0) > 0
