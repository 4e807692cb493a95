# SPDX-License-Identifier: Apache-2.0
"""What a runtime really handed to plugins, as plugins/recorded has kept it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tests.bed.cni import Json


@dataclass(frozen=True)
class Call:
    """One execution of a plugin; conf is its stdin, env what begins with CNI_."""

    plugin: str
    env: dict[str, str]
    conf: Json
    stdout: str
    stderr: str
    code: int

    @property
    def command(self) -> str:
        return self.env["CNI_COMMAND"]

    @property
    def container_id(self) -> str:
        return self.env["CNI_CONTAINERID"]

    @property
    def arguments(self) -> dict[str, str]:
        """CNI_ARGS."""
        pairs = self.env.get("CNI_ARGS", "").split(";")
        return dict(pair.split("=", 1) for pair in pairs if pair)


def read(folder: Path) -> list[Call]:
    """All calls that came to an end, in the order they began."""
    ended = sorted(folder.glob("*.code"), key=lambda path: _began(path).stat().st_mtime_ns)
    return [_call(path) for path in ended]


def _began(path: Path) -> Path:
    return path.with_suffix(".env")


def _call(path: Path) -> Call:
    lines = (line.partition("=") for line in _began(path).read_text().splitlines())
    return Call(
        plugin=path.name.rsplit("-", 3)[0],
        env={name: value for name, _, value in lines if name.startswith("CNI_")},
        conf=json.loads(path.with_suffix(".stdin").read_text()),
        stdout=path.with_suffix(".stdout").read_text(),
        stderr=path.with_suffix(".stderr").read_text(),
        code=int(path.read_text()),
    )
