# SPDX-License-Identifier: Apache-2.0
"""Lines on stderr, which the runtime puts into its own log next to the pod's name."""

from __future__ import annotations

import contextlib
import os

_subject = ""


def about(subject: str) -> None:
    """Name what the following lines are about, such as ``ADD 4f2a/eth0 shop/cart-7d9``."""
    global _subject
    _subject = f"{subject.rstrip()}: "


def say(text: str) -> None:
    """Write one line; a closed or full stderr does not fail the pod."""
    line = f"tcpip-bypass: {_subject}{text}".replace("\n", " ")
    with contextlib.suppress(OSError):
        os.write(2, line.encode("utf-8", "backslashreplace") + b"\n")
