# SPDX-License-Identifier: Apache-2.0
"""Whether this node has the programs of this version: a restart of the agent loads nothing anew."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from bpf import pins
from cni_plugin import names
from install.program import ROOT

if TYPE_CHECKING:
    from install.program.generations import Generation
    from install.program.node import Node

# What decides about the programs and about the mode. The kernel does too, but what it has loaded
# does not outlive it.
_SOURCES = (
    "bpf/**/*.c",
    "bpf/**/*.h",
    "bpf/*.py",
    "install/program/selftest.py",
    "install/program/probes.py",
)


def version() -> str:
    """A digest of the sources as they are now, which a `load` that starts now would compile."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in _SOURCES for path in ROOT.glob(pattern)):
        total.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def mark(node: Node, generation: Generation) -> dict[str, Any]:
    """What a load that has come to its end leaves in node.json."""
    return {**_setting(node, generation), "optional_pins": _optional_pins(generation)}


def _setting(node: Node, generation: Generation) -> dict[str, Any]:
    return {
        "programs": version(),
        "generation": generation.folder.name,
        "mends_fionread": node.mends_fionread,
    }


def _optional_pins(generation: Generation) -> list[str]:
    """Those that are there; this kernel may not allow all."""
    optional = (*pins.TRACES, pins.SPLICERS, pins.VISIT_SOCKET)
    return [pin for pin in optional if (generation.folder / pin).exists()]


def reason_to_load(node: Node) -> str | None:
    """None when the current generation is whole, of this version, and the kernel was tried."""
    return reason_to_publish(node) or reason_to_try(node)


def reason_to_try(node: Node) -> str | None:
    """None when the self-test was carried through, whatever it has found."""
    try:
        found = json.loads((node.state_dir / names.NODE_JSON).read_bytes())
        if found.get("tried", True):
            return None
    except (OSError, ValueError, AttributeError):
        return None  # there may have been none
    return f"the self-test could not be carried through: {node.state.node_mode()[1]}"


def _lost(found: dict[str, object], current: Generation) -> str:
    """What this generation had when it was loaded, and has not any more."""
    if found.get("mended") and not current.is_mended():
        return f"FIONREAD is mended no more: pins in {current.folder} are gone"
    optional = found.get("optional_pins")
    if current.is_retired():
        return f"the sockets of {current.folder.name} were told to leave"
    before = set(optional) if isinstance(optional, list) else set()
    if gone := before - set(_optional_pins(current)):
        return f"pins in {current.folder} are gone: {', '.join(sorted(gone))}"
    return ""


def reason_to_publish(node: Node) -> str | None:
    """None when the current generation is whole and of this version."""
    generations = node.generations
    current = generations.current()
    if current is None:
        return "nothing is loaded"
    if not current.is_whole():
        return f"some of the pins in {current.folder} are gone"
    path = node.state_dir / names.NODE_JSON
    try:
        found = json.loads(path.read_bytes())
        if lost := _lost(found, current):
            return lost
        if _setting(node, current).items() <= found.items():
            return None
    except (OSError, ValueError, AttributeError) as error:
        return f"{path} cannot be read: {error}"
    return f"{current.folder.name} is of another version or setting, or its load was broken off"
