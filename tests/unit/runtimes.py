# SPDX-License-Identifier: Apache-2.0
"""What container runtimes take from a folder of network configurations.

Written anew from the sources that install/program/conf_dir.py names, so that the two can disagree.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True)
class Network:
    """What a runtime would call, and with what name and version."""

    name: str
    version: str
    plugins: list[Json]

    def without_us(self) -> Network:
        others = [plugin for plugin in self.plugins if plugin["type"] != "tcpip-bypass"]
        return Network(self.name, self.version, others)


def _load(path: Path) -> Network:
    """Raises Exception when libcni would refuse it."""
    conf = json.loads(path.read_bytes().decode("utf-8", "replace"))
    if path.suffix != ".conflist":
        assert conf["type"]
        conf = {"name": "", **conf, "plugins": [conf]}
    assert isinstance(conf["name"], str)
    assert conf["plugins"]
    for plugin in conf["plugins"]:
        assert isinstance(plugin["type"], str)
        assert plugin["type"]
    newest = max([conf.get("cniVersion", "0.1.0"), *conf.get("cniVersions", [])])
    return Network(conf["name"] or path.name, newest, conf["plugins"])


def _files(folder: Path) -> list[Path]:
    if not folder.exists():
        return []
    found = [path for path in folder.iterdir() if path.suffix in (".conf", ".conflist", ".json")]
    return sorted(found, key=os.fsencode)


def containerd(folder: Path) -> Network | None:
    """The first file; no network at all when libcni refuses it."""
    try:
        return _load(_files(folder)[0])
    except Exception:
        return None


def crio(folder: Path, bin_dir: Path | None = None) -> Network | None:
    """The network of the first valid file, and of the files with its name the first valid one.

    With a bin_dir, our plugin in a file must speak its version.
    """
    found: dict[str, Network] = {}
    for path in _files(folder):
        try:
            network = _load(path)
        except Exception:
            continue
        names_us = network != network.without_us()
        if bin_dir and names_us and network.version not in spoken(bin_dir / "tcpip-bypass"):
            continue
        found.setdefault(network.name, network)
    return next(iter(found.values()), None)


def spoken(program: Path) -> list[str]:
    """The versions that the program says it speaks; none when it cannot be run."""
    try:
        done = subprocess.run(
            [program],
            env={"CNI_COMMAND": "VERSION"},
            input='{"cniVersion":"1.0.0"}',
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return []
    versions: list[str] = json.loads(done.stdout)["supportedVersions"]
    return versions
