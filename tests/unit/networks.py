# SPDX-License-Identifier: Apache-2.0
"""Conf folders of runtimes, as data: one file each in tests/fixtures/conflists.

A case has ``why``; ``uses``, the file that has our entry afterwards, or null; maybe ``options`` of
ours and ``problems``, texts that are reported; and the conf folder in three states: ``before``
(absent: there is no folder), ``installed``, when our entry is in, and ``removed``, when it was
taken out. The later two say how the folder differs from ``before``; without them it does not.

A file of the folder is its text, one byte a character; or null: it is gone; or how it differs from
the file of tests/fixtures/networks that ``like`` names: the lines under ``"3"`` come behind its
third one, those under ``"3-5"`` take the place of its lines 3 to 5.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.unit.cases import FOLDER

Folder = dict[str, bytes]


@dataclass(frozen=True)
class Network:
    """One file below tests/fixtures/conflists."""

    name: str
    uses: str | None
    options: dict[str, Any] | None
    problems: list[str]
    before: Folder | None
    installed: Folder
    removed: Folder


def text(name: str) -> str:
    """A file of tests/fixtures/networks, with the line ends that it has there."""
    return (FOLDER / "networks" / name).read_bytes().decode("latin-1")


def all_networks() -> list[Network]:
    return [_network(path) for path in sorted((FOLDER / "conflists").glob("*.json"))]


def _network(path: Path) -> Network:
    raw = json.loads(path.read_text(encoding="utf-8"))
    before = _changed({}, raw["before"]) if "before" in raw else None
    return Network(
        path.stem,
        raw["uses"],
        raw.get("options"),
        raw.get("problems", []),
        before,
        _changed(before or {}, raw.get("installed", {})),
        _changed(before or {}, raw.get("removed", {})),
    )


def _changed(folder: Folder, difference: dict[str, Any]) -> Folder:
    files = {**folder, **{name: _file(value) for name, value in difference.items()}}
    return {name: content for name, content in files.items() if content is not None}


def _file(value: Any) -> bytes | None:
    if value is None:
        return None
    if isinstance(value, str):
        return value.encode("latin-1")
    lines = text(value["like"]).split("\n")
    edits = {key: new for key, new in value.items() if key != "like"}
    for key in sorted(edits, key=_span, reverse=True):
        first, behind = _span(key)
        lines[first:behind] = edits[key]
    return "\n".join(lines).encode("latin-1")


def _span(key: str) -> tuple[int, int]:
    """The lines that are replaced, as a slice: none of them for an insertion."""
    first, dash, last = key.partition("-")
    return (int(first) - 1, int(last)) if dash else (int(first), int(first))
