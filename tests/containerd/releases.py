# SPDX-License-Identifier: Apache-2.0
"""Which containerd a node runs: the distribution's own, or one unpacked beside it.

runc stays the distribution's: that of newer suites asks for a newer C library, and any containerd
works with it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.bed.apt import KEYRING, AptError, PrivateApt, debian_mirrors
from tests.bed.bed import REFERENCE_PLUGINS, REPOSITORY

OWN = "own"
# What newer suites have. From 2 on the runtime speaks CNI 1.1 and calls STATUS. Its go-cni (as of
# 2.1.9) calls no GC, which libcni has: RuntimeBed.collect_garbage does.
SERIES = ("1.7", "2")
NAMES = (OWN, *SERIES)

_SUITES = ("trixie", "sid")
_FOLDER = REPOSITORY / "build/containerd"
_MIRROR = os.environ.get("TCPIP_BYPASS_MIRROR")  # a Debian archive; else this machine's own


@dataclass(frozen=True)
class Release:
    """A containerd, and reference plugins of its time."""

    name: str
    programs: Path  # containerd, its shim and ctr
    plugins: Path
    cni_version: str  # what its network configurations are written in


def chosen() -> Release:
    """The one that TCPIP_BYPASS_RUNTIME, of NAMES, asks for."""
    return get(os.environ.get("TCPIP_BYPASS_RUNTIME", OWN))


def get(name: str) -> Release:
    """A release by its name, of NAMES; downloaded unless it was before.

    Raises:
        AptError: it is not to be had.
    """
    if name == OWN:
        program = shutil.which("containerd")
        if program is None:
            raise AptError("containerd is not installed; run `make setup`")
        return Release(OWN, Path(program).parent, REFERENCE_PLUGINS, "1.0.0")
    root = _FOLDER / name
    if not root.exists():
        _FOLDER.mkdir(parents=True, exist_ok=True)
        with (_FOLDER / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not root.exists():
                _download(name, root)
    cni_version = "1.0.0" if name.startswith("1.") else "1.1.0"
    return Release(name, root / "usr/bin", root / "usr/lib/cni", cni_version)


def _download(series: str, root: Path) -> None:
    archive, _ = debian_mirrors(_MIRROR)
    sources = [f"deb [signed-by={KEYRING}] {archive} {suite} main" for suite in _SUITES]
    apt = PrivateApt(_FOLDER / "apt", sources)
    apt.update()
    found = apt.versions("containerd")
    version = next((each for each in found if each.startswith(f"{series}.")), None)
    if version is None:
        raise AptError(f"{', '.join(_SUITES)} have no containerd {series}, but {', '.join(found)}")
    apt.unpack([f"containerd={version}", "containernetworking-plugins"], root)
