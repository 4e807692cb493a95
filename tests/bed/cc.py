# SPDX-License-Identifier: Apache-2.0
"""The small C programs that play the ends of a connection, compiled where they are needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

HEADERS = Path(__file__).parent  # endpoint.h


def compiled(source: Path, folder: Path) -> Path:
    """Compile a program into folder and return its path."""
    program = folder / source.stem
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{HEADERS}"]
    subprocess.run(["gcc", *options, "-o", program, source], check=True)
    return program
