# SPDX-License-Identifier: Apache-2.0
"""Connections between the testbed's pods, over any hop and family, with both ends in this process.

Real plugins have made the pods and told the programs of them; the sockets are made by traffic.py.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bpf import pins
from bpf.loader import Limits
from bpf.stats import HopCounters
from install.program import generations, passes, report
from install.program.node import Node
from tests.bed import Bed, Pod
from tests.bed.pingpong import Hop
from tests.bed.pod import PROXY
from tests.integration import traffic_pods
from tests.integration.traffic_pods import Maker

Ends = tuple[socket.socket, socket.socket]
PASSES_S = 0.01  # between two passes
KNOWN = Limits()  # what a connection must have made of exchanges, and its age
SEEKING = 3 * KNOWN.segments  # rounds, after which an end that has found no peer gives up


def in_process(bed: Bed) -> Node:
    """The bed's node program without a process of its own, which would take a second."""
    return Node(bed.node.bpffs, bed.node.state_dir)


def counted(bed: Bed, *pods: Pod) -> dict[str, HopCounters]:
    """What the programs have counted for these pods, by hop."""
    wanted = {pod.name for pod in pods}
    found: dict[str, HopCounters] = {}
    for pod in report.report(in_process(bed))["pods"]:
        if pod["name"] in wanted:
            for hop, counters in pod["hops"].items():
                found[hop] = found.get(hop, HopCounters()) + HopCounters(**counters)
    return found


def total(bed: Bed, *pods: Pod) -> HopCounters:
    """The same, all hops together."""
    return _sum(counted(bed, *pods))


@contextmanager
def visited(maker: Maker) -> Iterator[None]:
    """For pods that go before the maker does: it would go with the pod that it is in."""
    try:
        yield
    finally:
        maker.leave()


@contextmanager
def paused(bed: Bed, *options: str) -> Iterator[None]:
    """As the operator says it, `options` for the one pod; resumed on leaving."""
    bed.node.call("pause", *options)
    try:
        yield
    finally:
        bed.node.call("resume", *options)


def listening(maker: Maker, hop: Hop) -> socket.socket:
    """A hop's listener; a sidecar's with IP_TRANSPARENT where TPROXY leads to it."""
    pod = hop.server
    family = socket.AF_INET6 if ":" in hop.listen else socket.AF_INET
    uid, gid = pod.user_of(hop.server_container)
    made = maker.make(pod, uid, family, gid=gid)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if pod.tproxy and hop.server_container == PROXY:
        made.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
    made.bind((hop.listen, hop.listen_port))
    made.listen()
    return made


def connecting(maker: Maker, hop: Hop) -> socket.socket:
    """The asker's socket, bound and connected.

    Raises:
        OSError: what connect(2) says, TimeoutError among them.
    """
    pod = hop.asker
    family = socket.AF_INET6 if ":" in hop.destination else socket.AF_INET
    uid, gid = pod.user_of(hop.asker_container)
    made = maker.make(pod, uid, family, gid=gid)
    try:
        made.bind((hop.source, 0))
        made.connect((hop.destination, hop.port))
    except BaseException:
        made.close()
        raise
    return made


@contextmanager
def connected(maker: Maker, hop: Hop) -> Iterator[Ends]:
    """(asker's end, listener's end) of a connection over a hop."""
    with (
        listening(maker, hop) as listener,
        connecting(maker, hop) as ours,
        traffic_pods.accepted(listener) as theirs,
    ):
        yield ours, theirs


def visit(bed: Bed) -> None:
    """A pass over this process, which has the tests' sockets open; the joiner visits pods only."""
    for generation in in_process(bed).generations.complete():
        with generations.opened(generation.folder / pins.VISIT) as program:
            passes.visit_process(program, os.getpid())


@contextmanager
def visiting(bed: Bed) -> Iterator[None]:
    """Passes over this process one after the other meanwhile, as over a pod's."""
    # FileNotFoundError: a generation is being removed.
    with passes.repeated(lambda: visit(bed), PASSES_S, FileNotFoundError):
        yield


def join(bed: Bed, *pairs: Ends) -> int:
    """Makes these connections known well enough to join; returns how many bytes that took."""
    sent = 0
    for _ in range(2):  # their programs meet them, and know them when they are old enough
        for ends in pairs:
            sent += traffic_pods.exchange(*ends, rounds=KNOWN.exchanges)
        time.sleep(2 * KNOWN.age_ms / 1000)
    for ends in pairs:
        sent += traffic_pods.exchange(*ends, rounds=KNOWN.exchanges)
    visit(bed)
    for left, right in pairs:
        sent += traffic_pods.consume(left, right) + traffic_pods.consume(right, left)
    return sent


@dataclass(frozen=True)
class Exchange:
    """What became of the bytes of one connection."""

    sent: int  # bytes since it may have joined
    bypassed: dict[str, int]  # bytes by hop, where any did
    paired: int  # ends that found each other

    def assert_bypassed(self, hop: str) -> None:
        """Every byte, and on no other hop."""
        assert (self.bypassed, self.paired) == ({hop: self.sent}, 2)

    def assert_by_tcp(self) -> None:
        assert (self.bypassed, self.paired) == ({}, 0)


def exchanged(bed: Bed, maker: Maker, hop: Hop) -> Exchange:
    """Connect over a hop, join, and exchange some bytes, each of which is checked."""
    pods = {hop.asker.name: hop.asker, hop.server.name: hop.server}.values()
    before = counted(bed, *pods)
    with connected(maker, hop) as ends:
        join(bed, ends)
        sent = traffic_pods.exchange(*ends)
    # The counters follow within a jiffy; a connection that is none of ours is never counted.
    traffic_pods.eventually(
        lambda: total(bed, *pods).bypassed_bytes - _sum(before).bypassed_bytes == sent,
        patience_s=0.2,
    )
    changes = {
        name: counters.since(before.get(name, HopCounters()))
        for name, counters in counted(bed, *pods).items()
    }
    return Exchange(
        sent,
        {name: change.bypassed_bytes for name, change in changes.items() if change.bypassed_bytes},
        sum(change.connections.get("paired", 0) for change in changes.values()),
    )


def _sum(counters: dict[str, HopCounters]) -> HopCounters:
    return sum(counters.values(), HopCounters())
