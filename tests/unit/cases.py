# SPDX-License-Identifier: Apache-2.0
"""The plugin's cases, as data: one file each in tests/fixtures/plugin, run against any build of it.

A case says how it differs from ``tests/fixtures/plugin-base.json``, and what must come out:

* ``why``: what the case is about
* ``command``: CNI_COMMAND; without it, the variable is not set
* ``versions``: the case runs once for each; ``@VERSION@`` stands for it, here and in the base
* ``env``, ``stdin``, ``prevResult``: keys that take the place of the base's, whole. ``@ABSENT@``
  takes a key away. A text for ``stdin`` is standard input itself, one byte a character, repeated
  ``times`` times
* ``annotations``: the pod's, in runtimeConfig; without them there is no runtimeConfig
* ``state``: the files of the state folder before the call: a text, or how a JSON file differs from
  the base's ``node.json`` or from its record below ``attachments``; for ``switch.json``, the whole
* ``result``: the whole document on stdout, or ``"as given"``: the prevResult on stdin, or
  ``"as in base"``; or ``error`` with cniVersion, code and msg, and ``mentions``, texts that msg and
  details must hold; with neither, stdout must be empty. The exit code is 1 with an error, else 0
* ``stderr``: texts that stderr must hold; with none, it must be empty
* ``left``: the files in the state folder afterwards; when it is absent, those from before

``@STATE@`` and ``@BPFFS@`` stand for two folders made for the run; the latter is empty.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "fixtures"
ROOT = FOLDER.parent.parent
ANNOTATIONS = "io.kubernetes.cri.pod-annotations"
EXPECTED = frozenset({"result", "error", "mentions", "stderr", "left"})
INPUT = frozenset({"env", "stdin", "times", "prevResult", "annotations", "state"})
KEYS = EXPECTED | INPUT | {"why", "command", "versions"}
BASES = {"GC": "node", "STATUS": "node", "VERSION": "version", None: "version"}  # others: pod


@dataclass(frozen=True)
class Answer:
    """What one run of the plugin gave back."""

    exit: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Case:
    """One file below tests/fixtures/plugin in one CNI version, all differences filled in."""

    name: str
    env: dict[str, str]
    stdin: bytes
    state: dict[str, bytes]
    expected: dict[str, Any]

    def run(self, argv: list[str], scratch: Path) -> Answer:
        """Run ``argv`` as the plugin, with its folders below ``scratch``."""
        places = {"@STATE@": str(scratch / "state"), "@BPFFS@": str(scratch / "bpffs")}
        (scratch / "bpffs").mkdir()
        (scratch / "state").mkdir()
        for name, content in self.state.items():
            path = scratch / "state" / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env={name: _fill(value, places) for name, value in self.env.items()},
            input=_fill(self.stdin.decode("latin-1"), places).encode("latin-1"),
            capture_output=True,
            check=False,
            timeout=300,
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
    return [case for path in sorted((FOLDER / "plugin").glob("*.json")) for case in cases_of(path)]


def cases_of(path: Path) -> list[Case]:
    """The case in this file, once for each of its versions."""
    text = path.read_text(encoding="utf-8")
    raw = json.loads(text)
    kind = BASES.get(raw.get("command"), "pod")
    is_built = kind == "pod" and not isinstance(raw.get("stdin"), str)
    if unknown := raw.keys() - KEYS:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}")
    if ("error" in raw) != ("mentions" in raw) or {"error", "result"} <= raw.keys():
        raise ValueError(f"{path}: either result, or error and mentions, or none of them")
    if not is_built and raw.keys() & {"prevResult", "annotations"}:
        raise ValueError(f"{path}: prevResult or annotations, without a stdin to hold them")
    versions = raw.get("versions") or _base("")[kind]["versions"]
    names = [path.stem] if len(versions) == 1 else [f"{path.stem}-{v}" for v in versions]
    return [
        _case(name, json.loads(_fill(text, {"@VERSION@": version})), _base(version), kind)
        for name, version in zip(names, versions)
    ]


@cache
def _base(version: str) -> dict[str, Any]:
    """The base in this version; its ``prevResult`` is the one in that version's form."""
    text = (FOLDER / "plugin-base.json").read_text(encoding="utf-8")
    base: dict[str, Any] = json.loads(_fill(text, {"@VERSION@": version}))
    base["prevResult"] = base["prevResult"]["0" if version.startswith("0.") else "1"]
    return base


def _case(name: str, raw: dict[str, Any], base: dict[str, Any], kind: str) -> Case:
    environment: dict[str, str] = {"CNI_COMMAND": raw["command"]} if "command" in raw else {}
    stdin, given = _stdin(raw, base, kind)
    state = {
        file: _state_file(file, difference, base["state"])
        for file, difference in raw.get("state", {}).items()
    }
    expected = {"exit": int("error" in raw), "stderr": [], "left": sorted(state)}
    expected |= {key: raw[key] for key in EXPECTED & raw.keys()}
    if raw.get("result") in ("as given", "as in base"):
        expected["result"] = given if raw["result"] == "as given" else base["prevResult"]
    environment |= _changed(base[kind]["env"], raw.get("env", {}))
    return Case(name, environment, stdin, state, expected)


def _stdin(raw: dict[str, Any], base: dict[str, Any], kind: str) -> tuple[bytes, Any]:
    """Standard input, and the prevResult in it."""
    difference = raw.get("stdin", {})
    if isinstance(difference, str):
        return difference.encode("latin-1") * raw.get("times", 1), None
    conf = dict(base[kind]["stdin"])
    if kind == "pod":
        conf["prevResult"] = _changed(base["prevResult"], raw.get("prevResult", {}))
        conf["runtimeConfig"] = {**conf["runtimeConfig"], ANNOTATIONS: raw.get("annotations")}
        if "annotations" not in raw:
            del conf["runtimeConfig"]
    conf = _changed(conf, difference)
    return _json(conf), conf.get("prevResult")


def _state_file(file: str, difference: Any, base: dict[str, Any]) -> bytes:
    if isinstance(difference, str):
        return difference.encode("latin-1")
    whole = {"switch.json": {}, "node.json": base["node.json"]}
    return _json(_changed(whole.get(file, base["attachments"]), difference))


def _changed(base: dict[str, Any], difference: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**base, **difference}.items() if value != "@ABSENT@"}


def _json(value: Any) -> bytes:
    return f"{json.dumps(value, indent=2)}\n".encode()


def check(case: Case, answer: Answer, scratch: Path) -> None:
    """Assert that ``answer`` is what the case expects, and no more."""
    expected = case.expected
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
    assert files_in(scratch / "state") == sorted(expected["left"])


def check_error(expected: dict[str, Any], answer: Answer) -> None:
    error = json.loads(answer.stdout)
    details = error.pop("details", "")
    assert error == expected["error"]
    for text in expected["mentions"]:
        assert text in f"{error['msg']} {details}"
