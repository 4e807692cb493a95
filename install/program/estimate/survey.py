# SPDX-License-Identifier: Apache-2.0
"""Looks at a node's connections for a while, and sums up what would bypass."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from install.program import log
from install.program.estimate import figures, files, sockets
from install.program.estimate.pairs import End, Judge, pair
from install.program.estimate.pods import Pod
from install.program.estimate.sockets import Buffers, Dump, Socket

LOOK_S = 1.0  # a connection that comes and goes in between is not seen
_LARGE_WRITE = 16_384  # what Envoy writes at most at a time; a stream's writes cannot be seen
PROXY_ONLY_HOPS = ("sidecars",)


@dataclass
class Traffic:
    """What ends of connections have sent while they were looked at."""

    connections: int = 0
    messages: float = 0.0
    bytes: int = 0

    def add(self, other: Traffic) -> None:
        self.connections += other.connections
        self.messages += other.messages
        self.bytes += other.bytes


@dataclass
class HopTraffic:
    """One hop of one pod, counted where it is sent, as `status` counts."""

    bypass: Traffic = field(default_factory=Traffic)
    tcp: dict[str, Traffic] = field(default_factory=dict)  # by reason

    @property
    def all(self) -> Traffic:
        whole = Traffic()
        for each in (self.bypass, *self.tcp.values()):
            whole.add(each)
        return whole

    def part(self, reason: str) -> Traffic:
        """What stays on TCP for this reason; without one, what would bypass."""
        return self.tcp.setdefault(reason, Traffic()) if reason else self.bypass

    def add(self, other: HopTraffic) -> None:
        self.bypass.add(other.bypass)
        for reason, traffic in other.tcp.items():
            self.part(reason).add(traffic)


@dataclass(frozen=True)
class Estimate:
    """The answer."""

    seconds: float
    pods: list[Pod]
    hops: dict[Pod, dict[str, HopTraffic]]  # by hop of bpf/abi.py
    calls: float  # messages of sidecars to other pods' sidecars, or to what is not on this node
    calls_on_node: float  # those to a sidecar on this node
    unseen_files: int  # sockets whose process could not be seen, so nor whether they block

    @property
    def total(self) -> dict[str, HopTraffic]:
        found: dict[str, HopTraffic] = {}
        for hops in self.hops.values():
            for hop, traffic in hops.items():
                found.setdefault(hop, HopTraffic()).add(traffic)
        return found

    @property
    def share_on_node(self) -> float | None:
        """Of calls between sidecars, those that stay on the node, at least; None without calls.

        What is elsewhere may be istiod, a pod without a sidecar or an external service, too.
        """
        return self.calls_on_node / self.calls if self.calls else None

    def saved_cpu(self, mode: str) -> float:
        """CPUs that would be saved, as a number of them, in a mode of names.MODES."""
        return sum(
            traffic.bypass.messages / 2 * figures.of(hop).saved_us / 1e6 / self.seconds
            for hop, traffic in self.total.items()
            if hop != "none" and (mode == "full" or hop in PROXY_ONLY_HOPS)
        )

    def saved_latency_us(self, mode: str) -> float | None:
        """What a call from one application to another would gain on average; None without calls.

        Two hops inside pods, as far as they would bypass, and the hop between sidecars for the
        share of calls that stays on the node.
        """
        if self.share_on_node is None:
            return None
        total = self.total
        saved = self._bypassing(total, "sidecars") * self.share_on_node * _saved_us("sidecars")
        if mode == "full":
            for hop in ("outbound", "inbound"):
                saved += self._bypassing(total, hop) * _saved_us(hop)
        return saved

    @staticmethod
    def _bypassing(total: dict[str, HopTraffic], hop: str) -> float:
        traffic = total.get(hop)
        if traffic is None or not traffic.all.messages:
            return 0.0
        return traffic.bypass.messages / traffic.all.messages


def _saved_us(hop: str) -> float:
    return figures.of(hop).saved_us


class Survey:
    """One look after the other; result() is what they show together."""

    def __init__(self, pods: Sequence[Pod], host_proc: Path, *, with_files: bool = True) -> None:
        """Without files, whether a socket blocks is not looked for."""
        self._with_files = with_files
        self._pods, self._host_proc = pods, host_proc
        self._first: dict[tuple[Pod, int], Socket] = {}  # by cookie; only what was there at first
        self._last: dict[Pod, dict[int, Socket]] = {pod: {} for pod in pods}
        self._buffers: dict[Pod, Buffers] = {}
        self._blocking: dict[int, bool] = {}
        self._looked = 0

    def look(self) -> None:
        """The sockets of every pod as they are now; a pod that has gone keeps its last ones."""
        inodes: set[int] = set()
        for pod in self._pods:
            try:
                found = sockets.dump(pod.netns)
            except OSError as error:
                if not self._looked:
                    log.warning("pod_not_seen", f"left out: {error}", pod=pod.title)
                continue
            self._buffers[pod] = found.buffers
            for socket in found.sockets:
                if not self._looked:
                    self._first[pod, socket.cookie] = socket
                self._last[pod][socket.cookie] = socket
                inodes.add(socket.inode)
        if self._with_files:
            self._look_at_files(inodes - self._blocking.keys() - {0})
        self._looked += 1

    def _look_at_files(self, inodes: set[int]) -> None:
        with contextlib.suppress(OSError):
            namespaces = [pod.netns for pod in self._buffers if Path(pod.netns).exists()]
            self._blocking.update(files.blocking(self._host_proc, namespaces, inodes))

    def run(self, seconds: float) -> Estimate:
        """Looks for so long, at least twice."""
        begin = time.monotonic()
        self.look()
        while (left := begin + seconds - time.monotonic()) > 0 or self._looked < 2:
            time.sleep(max(0.0, min(LOOK_S, left)))
            self.look()
        return self.result(time.monotonic() - begin)

    def result(self, seconds: float) -> Estimate:
        dumps = {
            pod: Dump(list(self._last[pod].values()), buffers)
            for pod, buffers in self._buffers.items()
        }
        listeners = [
            End(pod, socket, False)
            for pod, found in dumps.items()
            for socket in found.sockets
            if socket.is_listener
        ]
        judge = Judge(self._buffers, listeners, self._blocking)
        hops: dict[Pod, dict[str, HopTraffic]] = defaultdict(lambda: defaultdict(HopTraffic))
        calls = on_node = 0.0
        unseen = 0
        for connection in pair(dumps):
            reason = judge.reason(connection)
            for end in connection.ends:
                messages, size = self._grown(end)
                sent = Traffic(1, messages, size)
                hops[end.pod][connection.hop].part(reason).add(sent)
                unseen += end.socket.inode not in self._blocking
            if connection.client and connection.may_be_to_a_sidecar:
                messages, _ = self._grown(connection.client)
                calls += messages
                on_node += messages if connection.hop == "sidecars" else 0.0
        plain = {pod: dict(each) for pod, each in hops.items()}
        return Estimate(seconds, list(self._pods), plain, calls, on_node, unseen)

    def _grown(self, end: End) -> tuple[float, int]:
        """Messages and bytes that this end has sent while it was looked at."""
        now = end.socket
        before = self._first.get((end.pod, now.cookie), replace(now, sent=0, segments=0))
        size, segments = now.sent - before.sent, now.segments - before.segments
        if now.mss and size > 0.9 * segments * now.mss:
            return max(1.0, size / _LARGE_WRITE), size
        return float(segments), size
