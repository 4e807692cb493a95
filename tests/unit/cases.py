"""The cases in tests/fixtures: one folder each, as data, run against any build of the plugin.

A case holds ``env.json`` (the whole environment), ``stdin.json`` or ``stdin.raw``, maybe
``state/`` (what is in the state folder before), and ``expected.json``:

* ``why``: what the case is about
* ``exit``: the exit code
* ``result``: the whole document on stdout; or ``error`` with cniVersion, code and msg, and
  ``mentions``, texts that msg and details must hold; with neither, stdout must be empty
* ``stderr``: texts that stderr must hold; with none, it must be empty
* ``left``: the files in the state folder afterwards; when it is absent, those from before

``@STATE@`` and ``@BPFFS@`` stand for two folders made for the run; the latter is empty.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "fixtures"
ROOT = FOLDER.parent.parent


@dataclass(frozen=True)
class Answer:
    """What one run of the plugin gave back."""

    exit: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Case:
    """One folder below tests/fixtures."""

    folder: Path

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def files_before(self) -> list[str]:
        return files_in(self.folder / "state")

    def run(self, argv: list[str], scratch: Path) -> Answer:
        """Run ``argv`` as the plugin, with its folders below ``scratch``."""
        places = {"@STATE@": str(scratch / "state"), "@BPFFS@": str(scratch / "bpffs")}
        (scratch / "bpffs").mkdir()
        (scratch / "state").mkdir()
        if (self.folder / "state").exists():
            shutil.copytree(self.folder / "state", scratch / "state", dirs_exist_ok=True)
        raw = self.folder / "stdin.raw"
        stdin = raw if raw.exists() else self.folder / "stdin.json"
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env={name: _fill(value, places) for name, value in self.json("env.json").items()},
            input=_fill(stdin.read_bytes().decode("latin-1"), places).encode("latin-1"),
            capture_output=True,
            check=False,
            timeout=30,
        )
        swapped = {path: name for name, path in places.items()}
        return Answer(
            done.returncode,
            _fill(done.stdout.decode(), swapped),
            _fill(done.stderr.decode(), swapped),
        )


def _fill(text: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(name, value)
    return text


def files_in(folder: Path) -> list[str]:
    """Relative paths of all files but the cache of validated configurations."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in paths if "validated" not in path.parts)


def all_cases() -> list[Case]:
    return [Case(path.parent) for path in sorted(FOLDER.glob("*/expected.json"))]


def check(case: Case, answer: Answer, scratch: Path) -> None:
    """Assert that ``answer`` is what the case expects, whole and nothing else."""
    expected = case.json("expected.json")
    assert answer.exit == expected["exit"], answer
    if "result" in expected:
        assert json.loads(answer.stdout) == expected["result"]
    elif "error" in expected:
        check_error(expected, answer)
    else:
        assert answer.stdout == ""
    for text in expected["stderr"]:
        assert text in answer.stderr
    assert bool(answer.stderr) == bool(expected["stderr"]), answer.stderr
    left = expected.get("left", case.files_before())
    assert files_in(scratch / "state") == sorted(left)


def check_error(expected: dict[str, Any], answer: Answer) -> None:
    error = json.loads(answer.stdout)
    details = error.pop("details", "")
    assert error == expected["error"]
    for text in expected["mentions"]:
        assert text in f"{error['msg']} {details}"
