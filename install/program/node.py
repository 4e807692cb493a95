# SPDX-License-Identifier: Apache-2.0
"""One node, by its folders: what every command works on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cni_plugin import names
from cni_plugin.state import Attachment, State
from install.program import report, whole_file
from install.program.generations import Generations

LOCK_PATIENCE_S = 30.0


class NodeError(Exception):
    """The command could not do its work; the message says what to do about it."""


@dataclass(frozen=True)
class Node:
    """One node, by its folders."""

    bpffs: Path
    state_dir: Path
    conf_dir: Path | None = None  # the network configurations; None: the mode is never forced
    fionread: str | None = None  # of names.FIONREAD_CHOICES; None: the configuration says

    @property
    def generations(self) -> Generations:
        return Generations(self.bpffs)

    @property
    def state(self) -> State:
        return State(str(self.state_dir))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone on this node: no ADD, DEL or other command changes it meanwhile."""
        self.state.make()
        with self.state.locked(LOCK_PATIENCE_S):
            yield

    @property
    def mends_fionread(self) -> bool:
        """Whether FIONREAD is to be mended where the kernel has it wrong."""
        mend = names.FIONREAD_CHOICES[0]
        return (self.fionread or report.configured(self).get("fionread", mend)) == mend

    @property
    def is_mended(self) -> bool:
        """Whether the mode rests on the mend, as the last load has found."""
        try:
            return bool(json.loads((self.state_dir / names.NODE_JSON).read_bytes())["mended"])
        except (OSError, ValueError, TypeError, KeyError):
            return False

    @property
    def plugin_problem(self) -> str:
        """Why the node cannot run the plugin, as install found it; empty when it can."""
        try:
            return (self.state_dir / names.PLUGIN_PROBLEM).read_text()
        except OSError:
            return ""

    def note_plugin_problem(self, problem: str) -> None:
        """Raises OSError."""
        path = self.state_dir / names.PLUGIN_PROBLEM
        if not problem:
            path.unlink(missing_ok=True)
        elif problem != self.plugin_problem:
            self.state.make()
            whole_file.write(path, problem)

    def attachments(self) -> list[Attachment]:
        """Every attachment with a readable record."""
        return self.state.all()
