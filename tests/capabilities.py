# SPDX-License-Identifier: Apache-2.0
"""Capabilities by name, without the prefix CAP_; and a program with some of them only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path


@cache
def numbers() -> dict[str, int]:
    """As linux/capability.h has them."""
    header = Path("/usr/include/linux/capability.h").read_text()
    found = re.findall(r"^#define CAP_(\w+)\s+(\d+)$", header, re.MULTILINE)
    return {name: int(number) for name, number in found}


@cache
def of_this_machine() -> frozenset[str]:
    """Those that root can have here; a virtual machine of CI may lack some."""
    status = Path("/proc/self/status").read_text()
    bounding = int(status.partition("CapBnd:")[2].split()[0], 16)
    return frozenset(name for name, number in numbers().items() if bounding >> number & 1)


def with_only(names: Iterable[str]) -> list[str]:
    """The command line before another one, which root then runs with these capabilities."""
    kept = "".join(f",+{name.lower()}" for name in sorted(set(names) & of_this_machine()))
    return ["setpriv", f"--bounding-set=-all{kept}", "--inh-caps=-all", "--"]
