# SPDX-License-Identifier: Apache-2.0
"""Meshes alike but for how their bytes go, and what a load costs one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tests.bed import OPTED_OUT, Bed, Pod, cpus
from tests.bed.netns import LinkCounters
from tests.bed.pingpong import HOPS

Kind = Literal["plain", "bypass", "unix"]  # unix: all hops over AF_UNIX, where there is such a way
KINDS: tuple[Kind, ...] = ("plain", "bypass")

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """A client's and a server's pod, of the same kind."""

    kind: Kind
    client: Pod
    server: Pod

    def cpu_seconds(self) -> float:
        return self.client.cpu_seconds() + self.server.cpu_seconds()

    def links(self, ifname: str) -> LinkCounters:
        """The counters of one interface, both pods' added up."""
        return self.client.netns.link_counters(ifname) + self.server.netns.link_counters(ifname)


@dataclass(frozen=True)
class Bytes:
    """A hop's payload as the BPF programs counted it at both ends."""

    bypassed: int
    by_tcp: int

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(self.bypassed + other.bypassed, self.by_tcp + other.by_tcp)

    @property
    def share(self) -> float:
        """The part that bypassed TCP/IP, 0 to 1."""
        total = self.bypassed + self.by_tcp
        return self.bypassed / total if total else 0.0


@dataclass(frozen=True)
class Cost:
    """CPU time and packets of both pods of a pair while something ran."""

    cpu_s: float
    foreign_s: float  # CPU time that anybody else took on the CPU meanwhile
    veth: LinkCounters
    loopback: LinkCounters


@contextmanager
def pairs(bed: Bed) -> Iterator[tuple[Pair, Pair]]:
    """A pair whose pods opted out, and one whose pods are accelerated."""
    with pair(bed, "plain") as plain, pair(bed, "bypass") as bypass:
        payload(bed, bypass)  # says now, not in a minute, when the plugin has let the pods be
        yield plain, bypass


@contextmanager
def pair(bed: Bed, kind: Kind) -> Iterator[Pair]:
    """Two pods of one kind; those that are not to bypass have opted out."""
    annotations = {} if kind == "bypass" else OPTED_OUT
    with ExitStack() as stack:
        client, server = (
            stack.enter_context(bed.pod(f"{kind}-{role}", annotations=annotations))
            for role in ("client", "server")
        )
        yield Pair(kind, client, server)


def alternated(things: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Each round's number with each of the things in turn, every other round in reverse."""
    for number in range(rounds):
        for thing in things if number % 2 == 0 else reversed(things):
            yield number, thing


def measured(pair: Pair, cpu: str, run: Callable[[], T]) -> tuple[T, Cost]:
    """What a run over this pair gave, and what it cost; everything of it is on one CPU."""
    veth, loopback = pair.links("eth0"), pair.links("lo")
    busy_s, cpu_s = cpus.busy_seconds(cpu), pair.cpu_seconds()
    result = run()
    busy_s, cpu_s = cpus.busy_seconds(cpu) - busy_s, pair.cpu_seconds() - cpu_s
    links = pair.links("eth0") - veth, pair.links("lo") - loopback
    return result, Cost(cpu_s, max(0.0, busy_s - cpu_s), *links)


def payload(bed: Bed, accelerated: Pair) -> dict[str, Bytes]:
    """The payload counted so far by hop, over an accelerated pair; "none" is what no pair owned.

    Raises:
        RuntimeError: the node program does not know the pods, so nothing can have bypassed.
    """
    found = _counted(bed, accelerated)
    sums = {}
    for hop in (*HOPS, "none"):
        counters = [hops[hop] for hops in found if hop in hops]
        sums[hop] = Bytes(
            sum(counter["bypassed_bytes"] for counter in counters),
            sum(counter["tcp_bytes"] for counter in counters),
        )
    return sums


def outcomes(bed: Bed, accelerated: Pair) -> Counter[str]:
    """What came of the ends of the connections made so far, over an accelerated pair.

    Raises:
        RuntimeError: the node program does not know the pods.
    """
    sums: Counter[str] = Counter()
    for hops in _counted(bed, accelerated):
        for hop in hops.values():
            sums.update(hop["connections"])
    return sums


def _counted(bed: Bed, accelerated: Pair) -> list[dict[str, Any]]:
    """What the programs have counted for the pods of a pair: by pod, then by hop."""
    names = {accelerated.client.name, accelerated.server.name}
    pods = [pod for pod in bed.node.status()["pods"] if pod["name"] in names]
    if len(pods) != len(names):
        said = "\n".join(bed.chain.said)
        raise RuntimeError(f"the plugin has not accelerated {', '.join(sorted(names))}:\n{said}")
    return [pod["hops"] for pod in pods]
