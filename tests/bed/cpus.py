# SPDX-License-Identifier: Apache-2.0
"""Which CPUs measure, and how busy they are."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cpus:
    """The CPU that everything measured runs on, and those left for the rest."""

    measured: str
    others: tuple[str, ...]


def chosen() -> Cpus:
    """The last CPU measures; the calling process moves to the others, if there are any."""
    *others, measured = sorted(os.sched_getaffinity(0))
    if others:
        os.sched_setaffinity(0, others)
    return Cpus(str(measured), tuple(map(str, others)))


def busy_seconds(cpu: str) -> float:
    """Time that a CPU was not idle since boot, in the ticks of /proc/stat."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = _ticks(cpu)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def stolen_seconds(cpu: str) -> float:
    """Time since boot in which the hypervisor ran something else on a CPU that had work to do."""
    return _ticks(cpu)[7] / os.sysconf("SC_CLK_TCK")


def _ticks(cpu: str) -> list[int]:
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name == f"cpu{cpu}":
            return [int(each) for each in ticks]
    raise LookupError(f"/proc/stat has no cpu{cpu}")


def model() -> str:
    """What the CPUs call themselves."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return os.uname().machine
