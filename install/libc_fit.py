# SPDX-License-Identifier: Apache-2.0
"""Whether the frozen plugin finds a C library on the node that is new enough for it.

The plugin runs on the node's own glibc. This compares version numbers only; the plugin that is
tried as the node would run it says more.
"""

from __future__ import annotations

import re
from pathlib import Path

Version = tuple[int, ...]

_ELF = b"\x7fELF"
_NEEDED = re.compile(rb"GLIBC_(\d+(?:\.\d+)+)\0")
_GLIBC = re.compile(rb"GNU C Library .{0,80}?version (\d+(?:\.\d+)+)")
_GLIBC_PLACES = ("lib/*-linux-gnu*/libc.so.6", "lib64/libc.so.6", "lib/libc.so.6")
_MUSL_PLACES = ("lib/ld-musl-*.so.1",)


def why_not(plugin_dir: Path, host_root: Path) -> str:
    """Empty when it fits, or when the node's C library cannot be found to compare with.

    ``host_root`` is the node's root folder as this process sees it. Raises OSError.
    """
    wanted, there = needed(plugin_dir), of_host(host_root)
    if there is None and any(next(host_root.glob(place), None) for place in _MUSL_PLACES):
        return "the node has musl, and the plugin needs glibc"
    if there is None or wanted <= there:
        return ""
    return f"the plugin needs glibc {_text(wanted)}, and the node has {_text(there)}"


def needed(plugin_dir: Path) -> Version:
    """The highest version of glibc that a program or library of the frozen plugin asks for."""
    found: set[Version] = {(0,)}
    for path in plugin_dir.rglob("*"):
        if path.is_file() and (content := path.read_bytes()).startswith(_ELF):
            found |= {_version(each) for each in _NEEDED.findall(content)}
    return max(found)


def of_host(root: Path) -> Version | None:
    """The version of the node's glibc; None when none is found."""
    for place in _GLIBC_PLACES:
        for path in root.glob(place):
            if match := _GLIBC.search(path.read_bytes()):
                return _version(match[1])
    return None


def _version(text: bytes) -> Version:
    return tuple(map(int, text.decode().split(".")))


def _text(version: Version) -> str:
    return ".".join(map(str, version))
