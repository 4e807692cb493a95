# SPDX-License-Identifier: Apache-2.0
"""The exit statuses of commands that report: `status`, `selftest` and `check`."""

from __future__ import annotations

WELL = 0
LESS = 1  # it works, with less than there could be
NOT = 2  # it does not work, or could not be found out

WORDS = ("well", "works with less", "does not work")
REPORTING = ("status", "selftest", "check")
_OF_MODE = {"full": WELL, "proxy-only": LESS, "off": NOT}


def of_mode(mode: str) -> int:
    """The exit status that a mode of names.MODES stands for."""
    return _OF_MODE[mode]


def of_forced(mode: str, allowed: str) -> int:
    """Of a mode that is forced: above what the self-test allows, it works with less at best."""
    return max(of_mode(mode), LESS if of_mode(mode) < of_mode(allowed) else WELL)
