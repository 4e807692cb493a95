# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and its like: the first one unwinds, later ones must not break into the cleaning up."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_at_first() -> None:
    """From now on the first of these signals raises KeyboardInterrupt, and no later one does."""
    for each in STOPPING:
        signal.signal(each, _stop_once)


def _stop_once(number: int, _frame: FrameType | None) -> NoReturn:
    for each in STOPPING:
        signal.signal(each, lambda _number, _frame: None)  # SIG_IGN races with a pending one
    raise KeyboardInterrupt(signal.Signals(number).name)
