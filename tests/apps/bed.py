# SPDX-License-Identifier: Apache-2.0
"""The node that applications run on: pods of each kind, sidecars where the hop has them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

from bpf import abi
from install.program import report
from install.program.node import Node
from tests.apps import place, silence, sockets
from tests.apps.application import Application
from tests.apps.place import HopName, Place, Pods
from tests.bed import Bed, cni, envoy, open_bed
from tests.bed.envoy import Sidecar, Tls
from tests.bed.pairs import Bytes, Kind, Pair

Mode = Literal["full", "auto"]
# A network per mode: which pods are accelerated how is up to its plugin's configuration.
SUBNETS: dict[Mode, str] = {"full": "10.245.0.0/16", "auto": "10.246.0.0/16"}
BYPASS_WITHIN_S = 60
MESH = ("outbound", "sidecars", "inbound")  # the hops of a way through two sidecars


@dataclass(frozen=True)
class AppNode:
    """What applications are run on."""

    bed: Bed
    pods: Mapping[Kind, Pods]
    tls: Mapping[str, Tls]  # by pod, for the mTLS between sidecars


@contextmanager
def opened(
    wanted: Mapping[Mode, Sequence[Kind]], congestion: str | None = None
) -> Iterator[dict[Mode, AppNode]]:
    """A node that has, for each of these modes of the plugin's configuration, pods of its kinds.

    ``congestion`` is their TCP's congestion control; None: the machine's own.
    """
    with open_bed() as node, ExitStack() as stack:
        made = replace(node, congestion=congestion)
        yield {mode: _network(made, mode, kinds, stack) for mode, kinds in wanted.items()}


def _network(made: Bed, mode: Mode, kinds: Sequence[Kind], stack: ExitStack) -> AppNode:
    bridge = cni.bridge(made.ipam, [SUBNETS[mode]], name=f"cni-{mode}")
    bed = made.network(mode, bridge, mode=mode)
    all_pods = {kind: stack.enter_context(place.pods(bed, kind, mode)) for kind in kinds}
    pairs = [pods.mesh for pods in all_pods.values()]
    names = [pod.name for pair in pairs for pod in (pair.client, pair.server)]
    return AppNode(bed, all_pods, envoy.make_tls(bed.folder / f"tls-{mode}", names))


@contextmanager
def served(
    node: AppNode, application: Application, hop: HopName, kind: Kind, cpus: str = "-"
) -> Iterator[Place]:
    """The application runs on a hop of the pods of a kind, with two sidecars on the hop "mesh"."""
    where = place.place(node.pods[kind], hop, cpus)
    with ExitStack() as stack:
        if hop == "mesh":
            client, server = where.pair.client, where.pair.server
            speaks = application.protocol
            declared = speaks == "server-first"
            for pod, peer in ((client, server), (server, client)):
                sidecar = Sidecar(
                    endpoint=peer.ip,
                    tls=node.tls[pod.name],
                    detection="declared" if declared else "undeclared",
                    protocol="http2" if speaks == "http2" else "tcp" if declared else "http",
                )
                stack.enter_context(envoy.running(pod, sidecar, cpus))
        stack.enter_context(application.serve(where))
        yield where


def counted(node: AppNode, pair: Pair) -> dict[str, Bytes]:
    """The payload between a pair's pods so far, by hop; of pods that are accelerated."""
    ours = Node(node.bed.node.bpffs, node.bed.node.state_dir)
    wanted = (pair.client.name, pair.server.name)
    pod_ids = [each.pod_id for each in ours.attachments() if each.pod_name in wanted]
    sums = dict.fromkeys(abi.HOPS, Bytes(0, 0))
    for hops in report.by_pod(report.counters(ours.generations.complete(), pod_ids)).values():
        for hop, found in hops.items():
            sums[hop] += Bytes(found.bypassed_bytes, found.tcp_bytes)
    return sums


def verdict(node: AppNode) -> dict[str, Any]:
    """What the self-test has found of this kernel."""
    found: dict[str, Any] = json.loads((node.bed.node.state_dir / "node.json").read_bytes())
    return found


def faults(node: AppNode, application: Application) -> frozenset[str]:
    """The self-test's checks that this kernel fails and the application needs in `full`."""
    return application.needs & {
        check["name"] for check in verdict(node)["checks"] if not check["ok"]
    }


def mode_of_kernel(node: AppNode) -> str:
    """What `auto` decides here."""
    return str(verdict(node)["mode"])


def total(node: AppNode, pair: Pair) -> Bytes:
    """The same, all hops together."""
    return sum(counted(node, pair).values(), Bytes(0, 0))


def _bypassed(node: AppNode, where: Place) -> list[int]:
    """The bytes that have bypassed so far; on the hop "mesh" those of each hop of the way."""
    if where.hop != "mesh":
        return [total(node, where.pair).bypassed]
    found = counted(node, where.pair)
    return [found[hop].bypassed for hop in MESH]


def _moved(node: AppNode, pair: Pair) -> int:
    """The bytes that have moved so far between a pair's pods, and within them, either way."""
    by_ip = sum(sockets.received_bytes(pod.netns) for pod in (pair.client, pair.server))
    return total(node, pair).bypassed + by_ip


def check(
    node: AppNode,
    application: Application,
    where: Place,
    *,
    must_bypass: bool,
    within_s: float = BYPASS_WITHIN_S,
) -> float:
    """Check every byte; where it must, until some have bypassed: sockets join late.

    Returns how many seconds the last check took.

    Raises:
        AssertionError: what the application got is wrong, no byte moved for a while, a connection
            is left half-closed, or on some hop nothing has bypassed within so many seconds.
    """
    before = _bypassed(node, where) if must_bypass else []
    deadline = time.monotonic() + within_s
    while True:
        began = time.monotonic()
        with silence.refused(lambda: _moved(node, where.pair)):
            application.check(where)
        taken = time.monotonic() - began
        now = _bypassed(node, where) if must_bypass else []
        if all(after > earlier for after, earlier in zip(now, before)):
            break
        assert time.monotonic() < deadline, f"nothing has bypassed on some hop: {before}, {now}"
    left = sockets.unclosed(where.pair.client.netns, where.pair.server.netns)
    assert not left, f"half-closed for good: {', '.join(map(str, left))}"
    return taken
