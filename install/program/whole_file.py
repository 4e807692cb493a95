# SPDX-License-Identifier: Apache-2.0
"""Files of the state folder that other processes read at any moment."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, text: str) -> None:
    """The whole text or, when it cannot be written, what was there before; raises OSError."""
    staged = path.with_suffix(".part")
    try:
        staged.write_text(text)
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
