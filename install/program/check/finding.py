# SPDX-License-Identifier: Apache-2.0
"""What one check has found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from install.program import exits

# Where the documents say more. tests/unit/test_check.py holds each against its file.
NEEDS = "README.md#what-it-needs-and-what-it-cant-do"
KERNEL_TRIED = "docs/architecture.md#the-kernel-is-tried"
OUR_ENTRY = "docs/deploy.md#our-entry"
THE_PROGRAM = "docs/deploy.md#the-program"
THE_POD = "docs/deploy.md#what-the-pod-may-do-and-why"
INSTALLING = "docs/deploy.md#on-a-cluster"
WHY_NOT = "docs/operating.md#why-is-my-pod-not-accelerated"
CHECKS = "docs/operating.md#is-it-well"
SWITCH = "docs/deploy.md#turn-it-off-everywhere"
MEND = "docs/security.md#what-the-mend-of-fionread-writes"


@dataclass(frozen=True)
class Finding:
    """One line of the answer. `status` is of install/program/exits.py; a hint says what to do."""

    name: str
    status: int
    found: str
    hint: str = ""
    link: str = CHECKS

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "status": exits.WORDS[self.status]}


def well(name: str, found: str, link: str = CHECKS) -> Finding:
    return Finding(name, exits.WELL, found, "", link)


def less(name: str, found: str, hint: str, link: str = CHECKS) -> Finding:
    return Finding(name, exits.LESS, found, hint, link)


def broken(name: str, found: str, hint: str, link: str = CHECKS) -> Finding:
    return Finding(name, exits.NOT, found, hint, link)
