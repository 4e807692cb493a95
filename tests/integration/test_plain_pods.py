# SPDX-License-Identifier: Apache-2.0
"""Pods without a sidecar: to each other, through a ClusterIP, and between their own containers."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from cni_plugin import names
from install.program import report
from tests.bed import Bed, Pod, cni, kubeproxy, open_bed, pingpong
from tests.bed.addresses import FAMILIES, Family
from tests.bed.pingpong import PLAIN_HOPS, HopName
from tests.bed.pod import MESH
from tests.integration import reach, traffic_pods
from tests.integration.traffic_pods import Maker, eventually, exchange, receive
from tests.light import ACQUAINTANCE

ROUTED = ("10.246.0.0/16", "fd00:10:246::/64")
ACCELERATED = {names.ENABLED: "true"}
BLOCKED_S = 0.5


class Plain(NamedTuple):
    bed: Bed
    maker: Maker
    client: Pod
    server: Pod


@pytest.fixture(scope="module")
def settings() -> Iterator[dict[str, Plain]]:
    """Both ways to ask for it, each on another kind of network."""
    with ExitStack() as stack:
        bed = stack.enter_context(open_bed(subnets=cni.DUAL_STACK))
        routed = bed.network("routed", cni.ptp(bed.ipam, ROUTED), scope="all")
        maker = traffic_pods.socket_maker()

        def plain(name: str, network: Bed, annotations: dict[str, str]) -> tuple[Bed, Pod, Pod]:
            client, server = (
                stack.enter_context(
                    network.pod(f"{name}-{role}", interception=None, annotations=annotations)
                )
                for role in ("client", "server")
            )
            return network, client, server

        pods = {
            "annotation, bridge": plain("annotated", bed, ACCELERATED),
            "scope all, routed": plain("unmarked", routed, {}),
        }
        sockets = stack.enter_context(maker)
        yield {name: Plain(each[0], sockets, each[1], each[2]) for name, each in pods.items()}


@pytest.fixture(params=["annotation, bridge", "scope all, routed"])
def plain(settings: dict[str, Plain], request: pytest.FixtureRequest) -> Plain:
    return settings[request.param]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PLAIN_HOPS)
def test_plain_pods_bypass(plain: Plain, name: HopName, family: Family) -> None:
    bed, maker, client, server = plain
    with kubeproxy.service(bed.host, server, "v4", "v6"):
        done = reach.exchanged(bed, maker, pingpong.hop(name, client, server, family))
    done.assert_bypassed("local" if name == "local" else "direct")


def test_a_service_leads_to_whichever_pod_it_chose(settings: dict[str, Plain]) -> None:
    """The same ClusterIP means one pod now and another pod later; connections stay where they
    are."""
    bed, maker, client, first = settings["annotation, bridge"]
    second = settings["scope all, routed"].server
    before = reach.total(bed, client, first, second)
    with ExitStack() as stack:
        ends = []
        for server in (first, second):
            with kubeproxy.service(bed.host, server, "v4"):
                hop = pingpong.hop("service", client, server)
                ends.append(stack.enter_context(reach.connected(maker, hop)))
        reach.join(bed, *ends)
        traffic_pods.talk_all(ends, rounds=20)
    change = reach.total(bed, client, first, second).since(before)
    assert (change.connections["paired"], change.joined) == (4, 4)
    assert set(change.tcp_messages) == {"waiting", "order"}
    assert change.bypassed_messages == (ACQUAINTANCE + 20) * 4


def test_a_pod_that_calls_itself_through_its_service(plain: Plain) -> None:
    """kube-proxy makes such a connection come from the node: bytes arrive, bypassed or not."""
    bed, maker, _, server = plain
    with kubeproxy.service(bed.host, server, "v4"):
        assert reach.exchanged(bed, maker, pingpong.hop("service", server, server)).sent > 0


def test_a_pod_that_nobody_asked_for_stays_on_tcp(settings: dict[str, Plain]) -> None:
    bed, maker, client, _ = settings["annotation, bridge"]
    with bed.pod("nobody", interception=None) as server, reach.visited(maker):
        hop = pingpong.hop("direct", client, server)
        reach.exchanged(bed, maker, hop).assert_by_tcp()


@pytest.mark.parametrize("server_annotations", [ACCELERATED, MESH], ids=["plain", "sidecar"])
def test_status_says_what_to_do_where_addresses_do_not_fit(
    settings: dict[str, Plain], server_annotations: dict[str, str]
) -> None:
    bed, maker, plain_client, _ = settings["annotation, bridge"]
    is_plain = server_annotations is ACCELERATED
    advice = report.OLD_LISTENER if is_plain else report.UNKNOWN_SERVICE
    with (
        bed.pod("unfit", interception=None, annotations=server_annotations) as server,
        bed.pod("meshed", interception=None, annotations=MESH) as meshed,
        kubeproxy.service(bed.host, server, "v4"),
        reach.visited(maker),
    ):
        assert "mismatch" not in bed.node.call("status")
        client = meshed if is_plain else plain_client
        with reach.connected(maker, pingpong.hop("service", client, server)) as ends:
            exchange(*ends, rounds=reach.SEEKING)
        found = {pod["name"]: pod["advice"] for pod in bed.node.status()["pods"]}
        assert {name: said for name, said in found.items() if said} == {"unfit": advice}
        (line,) = re.findall(r"mismatch: (.*)", " ".join(bed.node.call("status").splitlines()))
        assert " ".join(line.split()) == f"default/unfit: {advice}."


# ---- Network policies ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["direct", "service"])
def test_a_policy_that_was_there_first_holds(plain: Plain, name: HopName) -> None:
    bed, maker, client, server = plain
    with (
        kubeproxy.service(bed.host, server, "v4"),
        kubeproxy.denied(bed.host, client, server),
        reach.listening(maker, pingpong.hop(name, client, server)),
        maker.make(client, 1000, socket.AF_INET) as ours,
    ):
        ours.settimeout(BLOCKED_S)
        hop = pingpong.hop(name, client, server)
        with pytest.raises(TimeoutError):
            ours.connect((hop.destination, hop.port))


@pytest.mark.parametrize("name", ["direct", "service"])
@pytest.mark.parametrize("paused", ["client", "server"])
def test_a_policy_that_comes_later_bites_once_the_pod_is_paused(
    plain: Plain, name: HopName, paused: str
) -> None:
    """A bypassed connection meets no rule; the operator can send it back to where the rules are."""
    bed, maker, client, server = plain
    pod = f"default/{(client if paused == 'client' else server).name}"
    with (
        kubeproxy.service(bed.host, server, "v4"),
        reach.connected(maker, pingpong.hop(name, client, server)) as (ours, theirs),
    ):
        reach.join(bed, (ours, theirs))
        with ExitStack() as stack:
            with kubeproxy.denied(bed.host, client, server):
                exchange(ours, theirs)
                stack.enter_context(reach.paused(bed, "--pod", pod))
                ours.sendall(b"forbidden")
                theirs.settimeout(BLOCKED_S)
                with pytest.raises(TimeoutError):
                    theirs.recv(1)
            theirs.settimeout(traffic_pods.TIMEOUT_S)
            assert receive(theirs, 9) == b"forbidden"  # TCP sent it again
            before = reach.total(bed, client, server).bypassed_bytes
            exchange(ours, theirs)
            assert reach.total(bed, client, server).bypassed_bytes == before
        exchange(ours, theirs)
        assert eventually(lambda: reach.total(bed, client, server).bypassed_bytes > before)
