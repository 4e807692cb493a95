# SPDX-License-Identifier: Apache-2.0
"""The node program, called as an operator calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from install.program import exits
from tests.bed import loading

PROGRAM = Path(__file__).parents[2] / ".venv" / "bin" / "tcpip-bypass-node"
TIMEOUT_S = 600  # a soak leaves a load of the programs little of the CPU, an emulator less


def is_report(command: str, status: int, printed: str) -> bool:
    """Whether a command has done its work, and its exit status is a part of the answer.

    A machine's kernel may allow less than the mode that is tested.
    """
    return command in exits.REPORTING and status in (exits.LESS, exits.NOT) and bool(printed)


@dataclass(frozen=True)
class NodeProgram:
    """`tcpip-bypass-node` with folders of its own."""

    bpffs: Path
    state_dir: Path

    def call(self, command: str, *options: str) -> str:
        """Run one of its commands and return what it printed.

        Raises:
            RuntimeError: it failed; the message holds what it said.
        """
        return self._run([PROGRAM], command, *options)

    def _run(self, program: Sequence[str | Path], command: str, *options: str) -> str:
        folders = ["--bpffs", str(self.bpffs), "--state-dir", str(self.state_dir)]
        done = subprocess.run(
            [*program, command, *options, *folders],
            text=True,
            capture_output=True,
            timeout=TIMEOUT_S,
            start_new_session=True,
            check=False,
        )
        if done.returncode != 0 and not is_report(command, done.returncode, done.stdout):
            said = f"ended with {done.returncode}: {done.stdout}{done.stderr}"
            raise RuntimeError(f"tcpip-bypass-node {command} {said}")
        return done.stdout

    def load(self) -> str:
        """As call("load"), but for the self-test: this kernel is tried once (loading.py)."""
        return self._run([sys.executable, loading.__file__], "load")

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """The programs loaded and pinned; unloaded on leaving."""
        try:
            self.load()
            with self.joining():
                yield
        finally:
            self.call("unload")

    @contextmanager
    def joining(self) -> Iterator[subprocess.Popen[bytes]]:
        """A joiner runs meanwhile, as the agent's would."""
        folders = ["--bpffs", str(self.bpffs), "--state-dir", str(self.state_dir)]
        with subprocess.Popen(
            [PROGRAM, "join", "--parent", str(os.getpid()), *folders], start_new_session=True
        ) as joiner:
            try:
                yield joiner
            finally:
                joiner.terminate()

    def status(self) -> dict[str, Any]:
        """`status --json`."""
        answer: dict[str, Any] = json.loads(self.call("status", "--json"))
        return answer
