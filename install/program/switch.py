# SPDX-License-Identifier: Apache-2.0
"""The cluster's switch: a ConfigMap that holds for every node, mounted into the agent's pod.

Each of its keys is a file, with a text as people write it. kubelet swaps all of them at once, by
renaming the symbolic link ``..data``, so they are read in the folder where that leads just then.

What was read last and made sense is kept in the state folder, as ``switch.json``: the plugin reads
it on ADD, and it stands while the ConfigMap makes no sense. Beside it is kept which pauses are the
switch's alone (see install/program/pauses.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bpf import abi
from cni_plugin import names, policy
from cni_plugin.state import State
from install.program import whole_file

CONFIGMAP = "tcpip-bypass-switch"
MODES = ("auto", *names.MODES)
_DATA = "..data"  # kubelet, pkg/volume/util/atomic_writer.go
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # as in conf/schema.json


class SwitchError(Exception):
    """The ConfigMap makes no sense; the message names every key and what is wrong with it."""


@dataclass(frozen=True)
class Switch:
    """What holds for every node. The default is what an empty ConfigMap says."""

    paused: bool = False
    mode: str | None = None  # None: each node's configuration says
    exclude_namespaces: tuple[str, ...] = ()
    exclude_ports: tuple[str, ...] = ()  # ports and ranges, "3306" and "8000-8100"

    @property
    def is_stop(self) -> bool:
        """Whether every byte of every node is to go by TCP."""
        return self.paused or self.mode == "off"

    def as_json(self) -> dict[str, Any]:
        """By the keys of the ConfigMap."""
        return {
            "paused": self.paused,
            "mode": self.mode,
            "excludeNamespaces": list(self.exclude_namespaces),
            "excludePorts": list(self.exclude_ports),
        }


@dataclass(frozen=True)
class Kept:
    """What `switch.json` holds: the switch, and which pauses in the kernel are its alone."""

    switch: Switch = Switch()
    holds_node: bool = False
    held_pods: frozenset[int] = frozenset()  # pod IDs


def read(folder: Path) -> Switch:
    """What the mounted ConfigMap says; a folder that is missing or empty says nothing.

    Raises:
        SwitchError: it makes no sense.
        OSError: it cannot be read.
    """
    for last in (False, False, True):
        try:
            return parse(_texts(folder))
        except FileNotFoundError:  # kubelet has swapped it meanwhile
            if last:
                raise
    raise AssertionError("not reached")


def _texts(folder: Path) -> dict[str, str]:
    data = (folder / _DATA).resolve() if (folder / _DATA).exists() else folder
    if not data.exists():
        return {}
    found = {}
    for path in data.iterdir():
        if not path.name.startswith("..") and path.is_file():
            found[path.name] = path.read_bytes().decode("utf-8", "replace").strip()
    return found


def parse(texts: Mapping[str, str]) -> Switch:
    """The switch, from the ConfigMap's keys and values; raises SwitchError."""
    parsers: dict[str, Callable[[str], dict[str, Any]]] = {
        "paused": _paused,
        "mode": _mode,
        "excludeNamespaces": _namespaces,
        "excludePorts": _ports,
    }
    wrong, found = [], Switch()
    for key, text in sorted(texts.items()):
        parser = parsers.get(key)
        if parser is None:
            wrong.append(f"{key!r:.80} is no key; there are {', '.join(parsers)}")
            continue
        try:
            found = replace(found, **parser(text))
        except ValueError as error:
            wrong.append(f"{key}: {error}")
    if wrong:
        raise SwitchError("; ".join(wrong))
    return found


def _paused(text: str) -> dict[str, Any]:
    paused = {"true": True, "false": False}.get(text.lower())
    if paused is None:
        raise ValueError(f'{text!r:.80} is neither "true" nor "false"')
    return {"paused": paused}


def _mode(text: str) -> dict[str, Any]:
    if text and text not in MODES:
        raise ValueError(f"{text!r:.80} is none of {', '.join(MODES)}")
    return {"mode": text or None}


def _namespaces(text: str) -> dict[str, Any]:
    namespaces = _listed(text)
    for each in namespaces:
        if not _NAMESPACE.fullmatch(each):
            raise ValueError(f"{each!r:.80} is no name of a namespace")
    return {"exclude_namespaces": namespaces}


def _ports(text: str) -> dict[str, Any]:
    ports = _listed(text)
    ranges = policy.merge_ports(policy.parse_ports(",".join(ports)))
    if (most := abi.MAX_PORT_RANGES) < len(ranges):
        raise ValueError(f"{len(ranges)} separate ranges, of which there may be {most}")
    return {"exclude_ports": ports}


def _listed(text: str) -> tuple[str, ...]:
    """What stands between commas, spaces and line ends, each once."""
    return tuple(dict.fromkeys(filter(None, re.split(r"[\s,]+", text))))


def kept(state: State) -> Kept | None:
    """What was kept last; None when that is nothing, is damaged, or cannot be read."""
    try:
        found = state.switch()
        if found is None:
            return None
        switch = Switch(
            paused=bool(found["paused"]),
            mode=found["mode"],
            exclude_namespaces=tuple(found["excludeNamespaces"]),
            exclude_ports=tuple(found["excludePorts"]),
        )
        return Kept(switch, bool(found["holdsNode"]), frozenset(found["heldPods"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(state: State, what: Kept) -> None:
    """Whole or not at all; raises OSError."""
    held = {"holdsNode": what.holds_node, "heldPods": sorted(what.held_pods)}
    text = json.dumps({**what.switch.as_json(), **held}, indent=1)
    whole_file.write(state.folder / names.SWITCH_JSON, text)
