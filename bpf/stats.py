# SPDX-License-Identifier: Apache-2.0
"""Reads the counters that the programs keep per pod and hop."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bpf import abi

POSSIBLE_CPUS = Path("/sys/devices/system/cpu/possible")


@dataclass(frozen=True)
class HopCounters:
    """What happened on one hop of one pod since it was ADDed, summed over all CPUs."""

    bypassed_messages: int = 0
    bypassed_bytes: int = 0
    tcp_bytes: int = 0
    tcp_messages: dict[str, int] = field(default_factory=dict)  # by reason, non-zero ones
    connections: dict[str, int] = field(default_factory=dict)  # by outcome, non-zero ones
    joined: int = 0  # sockets put into the sockhash
    left: int = 0  # and taken out while open

    def __add__(self, other: HopCounters) -> HopCounters:
        return HopCounters(
            self.bypassed_messages + other.bypassed_messages,
            self.bypassed_bytes + other.bypassed_bytes,
            self.tcp_bytes + other.tcp_bytes,
            _sum(self.tcp_messages, other.tcp_messages),
            _sum(self.connections, other.connections),
            self.joined + other.joined,
            self.left + other.left,
        )

    def since(self, before: HopCounters) -> HopCounters:
        """What has been added to `before`; all of it when the counters were made anew since."""
        added = HopCounters(
            self.bypassed_messages - before.bypassed_messages,
            self.bypassed_bytes - before.bypassed_bytes,
            self.tcp_bytes - before.tcp_bytes,
            _difference(self.tcp_messages, before.tcp_messages),
            _difference(self.connections, before.connections),
            self.joined - before.joined,
            self.left - before.left,
        )
        numbers = (
            *(added.bypassed_messages, added.bypassed_bytes, added.tcp_bytes),
            *(added.joined, added.left),
            *added.tcp_messages.values(),
            *added.connections.values(),
        )
        return added if min(numbers) >= 0 else self


def _sum(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    return {key: left.get(key, 0) + right.get(key, 0) for key in {**left, **right}}


def _difference(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
    return _sum(left, {key: -count for key, count in right.items()})


@functools.cache
def possible_cpus() -> int:
    """How many values a per-CPU map holds per key: the last possible CPU's number plus one."""
    ranges = POSSIBLE_CPUS.read_text().strip()
    return int(ranges.replace(",", "-").split("-")[-1]) + 1


def pod_counters(pod_id: int, lookup: Callable[[bytes, int], bytes]) -> dict[str, HopCounters]:
    """The counters of one pod by hop, those hops that have any.

    `lookup(key, size)` reads the map ``counters``; it raises FileNotFoundError (ENOENT) for a key
    that is not there.
    """
    cpus = possible_cpus()
    found = {}
    for number, hop in enumerate(abi.HOPS):
        key = bytes(abi.CounterKey(pod_id, number, 0))
        try:
            raw = lookup(key, ctypes.sizeof(abi.Counters) * cpus)
        except FileNotFoundError:
            continue
        found[hop] = _named(abi.Counters.from_buffer_copy(_over_cpus(raw)))
    return found


def _over_cpus(raw: bytes) -> array[int]:
    """Sums the values of all CPUs, each a struct of nothing but 64-bit numbers."""
    words = memoryview(raw).cast("Q")
    width = ctypes.sizeof(abi.Counters) // words.itemsize
    return array("Q", (sum(words[member::width]) for member in range(width)))


def _named(value: abi.Counters) -> HopCounters:
    return HopCounters(
        value.bypassed_messages,
        value.bypassed_bytes,
        value.tcp_bytes,
        {name: count for name, count in zip(abi.REASONS, value.tcp_messages) if count},
        {name: count for name, count in zip(abi.OUTCOMES, value.connections) if count},
        value.joined,
        value.left,
    )
