# SPDX-License-Identifier: Apache-2.0
"""A hundred thousand iptables rules in a packet's way, none of which it matches.

The rules stand in the node's namespace, between the pods, in the filter table (FORWARD), where
network policies are and every packet meets them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from tests.bed.netns import NetNamespace

Place = Literal["none", "filter"]
CHAIN = "TB_FILLERS"
HOOK = "FORWARD"


@contextmanager
def standing(host: NetNamespace, place: Place, count: int) -> Iterator[None]:
    """`count` rules at a place in the node's namespace, gone on leaving; "none" does nothing."""
    if place == "none":
        yield
        return
    rules = [f"*{place}", f":{CHAIN} - [0:0]", f"-I {HOOK} -p tcp -j {CHAIN}"]
    rules += [f"-A {CHAIN} -d {_address(number)}/32 -j ACCEPT" for number in range(count)]
    _restore(host, [*rules, "COMMIT"])
    try:
        yield
    finally:
        gone = [f"-D {HOOK} -p tcp -j {CHAIN}", f"-F {CHAIN}", f"-X {CHAIN}"]
        _restore(host, [f"*{place}", *gone, "COMMIT"])


def _address(number: int) -> str:
    """An address of 198.18.0.0/15, which RFC 2544 keeps for benchmarks."""
    return f"198.{18 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"


def _restore(host: NetNamespace, lines: list[str]) -> None:
    with host.entered():
        done = subprocess.run(
            ["iptables-restore", "--noflush", "--wait", "5"],
            input="\n".join(lines) + "\n",
            text=True,
            capture_output=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"iptables-restore in {host.name}: {done.stderr.strip()}")
