# SPDX-License-Identifier: Apache-2.0
"""Opt-outs by the operator and by the pod's owner, and traffic that Istio leaves alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from cni_plugin import names
from tests.bed import APP_UID, PROXY_UID, Bed, Pod, cni, open_bed, pingpong
from tests.bed.istio import INBOUND_PORT, Interception
from tests.bed.pingpong import HopName
from tests.bed.pod import APP, PROXY
from tests.integration import reach, traffic_pods
from tests.integration.traffic_pods import Maker, exchange

PLAIN = {names.ENABLED: "true"}
DATABASE = 3306
GATEWAY = "10.244.0.1"  # an address of the node


class Node(NamedTuple):
    bed: Bed
    maker: Maker


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with open_bed() as bed, traffic_pods.socket_maker() as maker:
        yield Node(bed, maker)


@pytest.fixture
def pods(node: Node) -> Iterator[ExitStack]:
    """Pods that a test enters here are gone before the next one."""
    with ExitStack() as stack:
        yield stack
        node.maker.leave()


def pair(
    stack: ExitStack, bed: Bed, client: Mapping[str, str], server: Mapping[str, str]
) -> tuple[Pod, Pod]:
    made = (
        stack.enter_context(bed.pod(role, interception=None, annotations=annotations))
        for role, annotations in (("client", client), ("server", server))
    )
    return next(made), next(made)


# ---- The operator and the pod's owner --------------------------------------------------------


@pytest.mark.parametrize("end", ["client", "server"])
def test_excluded_ports_and_ranges(node: Node, pods: ExitStack, end: str) -> None:
    excluding = {**PLAIN, names.EXCLUDE_PORTS: "3306, 8000-8079,8081"}
    annotations = {"client": PLAIN, "server": PLAIN, end: excluding}
    client, server = pair(pods, node.bed, annotations["client"], annotations["server"])
    hop = pingpong.hop("direct", client, server)
    for port, stays in {3306: True, 8000: True, 8079: True, 8080: False, 8081: True}.items():
        done = reach.exchanged(node.bed, node.maker, replace(hop, port=port, listen_port=port))
        if stays:
            done.assert_by_tcp()
        else:
            done.assert_bypassed("direct")


def test_ports_that_the_configuration_excludes(node: Node, pods: ExitStack) -> None:
    bed = network(node.bed, "ports", 1, scope="all", excludePorts=[9999, "20000-20100"])
    client, server = pair(pods, bed, {}, {names.EXCLUDE_PORTS: "8081"})
    hop = pingpong.hop("direct", client, server)
    for port, stays in {8080: False, 8081: True, 9999: True, 20_050: True, 20_101: False}.items():
        done = reach.exchanged(bed, node.maker, replace(hop, port=port, listen_port=port))
        if stays:
            done.assert_by_tcp()
        else:
            done.assert_bypassed("direct")


def network(bed: Bed, name: str, number: int, **conf: Any) -> Bed:
    """Another network of the node, with that configuration of ours."""
    primary = cni.bridge(bed.ipam, (f"10.{200 + number}.0.0/16",), name=f"cni{number}")
    return bed.network(name, primary, **conf)


def test_excluded_namespaces(node: Node, pods: ExitStack) -> None:
    bed = network(node.bed, "namespaces", 2, scope="all", excludeNamespaces=["kube-system"])
    client, server = pair(pods, bed, {}, {})
    system = pods.enter_context(
        bed.pod("system", namespace="kube-system", interception=None, annotations=PLAIN)
    )
    hop = pingpong.hop("direct", client, server)
    reach.exchanged(bed, node.maker, hop).assert_bypassed("direct")
    for each in (pingpong.hop("direct", client, system), pingpong.hop("local", client, system)):
        reach.exchanged(bed, node.maker, each).assert_by_tcp()


@pytest.mark.parametrize("end", ["client", "server"])
def test_proxy_only_pods(node: Node, pods: ExitStack, end: str) -> None:
    annotations = {"client": {}, "server": {}, end: {names.PROXY_ONLY: "true"}}
    client, server = (
        pods.enter_context(node.bed.pod(role, annotations=annotations[role]))
        for role in ("client", "server")
    )
    restricted: dict[HopName, str] = {"sidecars": "", "outbound": "client", "inbound": "server"}
    for name, at in restricted.items():
        done = reach.exchanged(node.bed, node.maker, pingpong.hop(name, client, server))
        if at == end:
            done.assert_by_tcp()
        else:
            done.assert_bypassed(name)


def test_a_gateway_that_asks_counts_as_a_sidecar(node: Node, pods: ExitStack) -> None:
    bed = network(node.bed, "gateway", 3, mode="proxy-only")
    gateway = pods.enter_context(bed.pod("gateway", interception=None, annotations=PLAIN))
    server = pods.enter_context(bed.pod("server"))
    hop = pingpong.hop("sidecars", gateway, server)
    reach.exchanged(bed, node.maker, hop).assert_bypassed("sidecars")
    inside = pingpong.hop("inbound", gateway, server)
    reach.exchanged(bed, node.maker, inside).assert_by_tcp()


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (names.ENABLED, "yes please"),
        (names.PROXY_ONLY, "sometimes"),
        (names.EXCLUDE_PORTS, "3306;5432"),
        (names.EXCLUDE_PORTS, "9000-8000"),
        (names.EXCLUDE_PORTS, "70000"),
    ],
)
def test_a_bad_annotation_is_told_and_leaves_the_pod_on_tcp(
    node: Node, pods: ExitStack, annotation: str, value: str
) -> None:
    node.bed.chain.said.clear()
    client, server = pair(pods, node.bed, PLAIN, {**PLAIN, annotation: value})
    (said,) = (line for line in node.bed.chain.said if "bad annotation" in line)
    for part in ("default/server", annotation, value):
        assert part in said
    reach.exchanged(node.bed, node.maker, pingpong.hop("direct", client, server)).assert_by_tcp()


# ---- What Istio leaves alone -----------------------------------------------------------------


def test_ports_that_istio_does_not_intercept(node: Node, pods: ExitStack) -> None:
    """Application to application past both sidecars, and past one of them."""
    client = pods.enter_context(
        node.bed.pod("client", interception=Interception(exclude_outbound_ports=(DATABASE,)))
    )
    database, behind_envoy = (
        pods.enter_context(node.bed.pod(name, interception=interception))
        for name, interception in (
            ("database", Interception(exclude_inbound_ports=(DATABASE,))),
            ("behind-envoy", Interception()),
        )
    )
    for server, port in ((database, DATABASE), (behind_envoy, INBOUND_PORT)):
        hop = replace(
            pingpong.hop("direct", client, server),
            port=DATABASE,
            listen_port=port,
            server_container=APP if server is database else PROXY,
        )
        reach.exchanged(node.bed, node.maker, hop).assert_bypassed("direct")
    hops: tuple[HopName, ...] = ("outbound", "sidecars")
    for name in hops:  # and the rest is intercepted as ever
        hop = pingpong.hop(name, client, database)
        reach.exchanged(node.bed, node.maker, hop).assert_bypassed(name)


def test_ranges_that_istio_intercepts(node: Node, pods: ExitStack) -> None:
    interception = Interception(include_outbound_ranges=("10.96.0.0/16",))
    client, server = (
        pods.enter_context(node.bed.pod(name, interception=each))
        for name, each in (("client", interception), ("server", Interception()))
    )
    hop = pingpong.hop("outbound", client, server)
    reach.exchanged(node.bed, node.maker, hop).assert_bypassed("outbound")
    past = replace(
        pingpong.hop("direct", client, server),
        listen_port=INBOUND_PORT,
        server_container=PROXY,
    )
    reach.exchanged(node.bed, node.maker, past).assert_bypassed("direct")


@pytest.mark.parametrize("uid", [APP_UID, PROXY_UID], ids=["application", "sidecar"])
def test_off_the_host(node: Node, pods: ExitStack, uid: int) -> None:
    """A server that is no pod of this node: its client stays out of everything."""
    client = pods.enter_context(
        node.bed.pod("client", interception=Interception(exclude_outbound_ports=(DATABASE,)))
    )
    with (
        node.bed.host.entered(),
        socket.create_server((GATEWAY, DATABASE)) as away,
        node.maker.make(client, uid, socket.AF_INET) as ours,
    ):
        ours.connect((GATEWAY, DATABASE))
        with traffic_pods.accepted(away) as theirs:
            exchange(ours, theirs, rounds=reach.SEEKING)
    counters = reach.total(node.bed, client)
    assert counters.connections == {"no_peer": 1}
    assert counters.bypassed_bytes == counters.tcp_bytes == 0
