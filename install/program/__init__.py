# SPDX-License-Identifier: Apache-2.0
"""The node program, `tcpip-bypass-node`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).parents[2]  # of the source tree: where `python -m` finds what runs as a child


def _project() -> dict[str, Any]:
    """Of pyproject.toml, which stands in the root, in the image as well."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project: dict[str, Any] = tomllib.loads(text)["project"]
    return project


VERSION: str = _project()["version"]
