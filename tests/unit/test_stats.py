# SPDX-License-Identifier: Apache-2.0
"""How the values of all CPUs become one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from bpf import abi, stats
from bpf.stats import HopCounters


def test_all_cpus_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "possible_cpus", lambda: 3)
    per_cpu = (abi.Counters * 3)()
    for cpu, value in enumerate(per_cpu, 1):
        value.bypassed_messages = cpu
        value.bypassed_bytes = 10 * cpu
        value.tcp_messages[1] = cpu
        value.tcp_bytes = 2**62
        value.connections[6] = 1

    def lookup(key: bytes, size: int) -> bytes:
        assert size == 3 * ctypes.sizeof(abi.Counters)
        if abi.CounterKey.from_buffer_copy(key).hop != 2:
            raise FileNotFoundError
        return bytes(per_cpu)

    assert stats.pod_counters(1, lookup) == {
        "outbound": HopCounters(6, 60, 3 * 2**62, {"waiting": 6}, {"blocking": 3})
    }


def test_possible_cpus_is_the_last_ones_number_plus_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    possible = tmp_path / "possible"
    monkeypatch.setattr(stats, "POSSIBLE_CPUS", possible)
    for text, count in (("0\n", 1), ("0-3\n", 4), ("0,2-5\n", 6), ("0-1,8\n", 9)):
        possible.write_text(text)
        assert stats.possible_cpus.__wrapped__() == count
