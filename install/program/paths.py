# SPDX-License-Identifier: Apache-2.0
"""Where things of other programs' are on a node, and where the frozen plugin comes from."""

from __future__ import annotations

from pathlib import Path

from install.program import ROOT

CNI_CONF_DIR = Path("/etc/cni/net.d")
CNI_BIN_DIR = Path("/opt/cni/bin")

_BUILT = ROOT / "dist" / "tcpip-bypass"
_IN_IMAGE = Path("/usr/lib/tcpip-bypass")


def plugin_dir() -> Path:
    """The folder that PyInstaller made: in the source tree if it was built there."""
    return _BUILT if _BUILT.exists() else _IN_IMAGE
