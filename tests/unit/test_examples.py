# SPDX-License-Identifier: Apache-2.0
"""The command lines that `tcpip-bypass-node --help`, the README and the documents show.

`helm` and `kubectl` are the real ones. They know of an API server that does not answer, and go as
far as that lets them.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml

from install.program import switch
from install.program.cli import build_parser
from install.program.examples import EXAMPLES, PROGRAM
from tests import bare, manifests
from tests.unit.cases import ROOT

LINES = [arguments for examples in EXAMPLES.values() for _, arguments in examples]


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (
        each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction)
    )
    return dict(action.choices)


def test_every_command_has_one() -> None:
    assert set(EXAMPLES) == set(commands())


@pytest.mark.parametrize("arguments", LINES)
def test_the_program_takes_it(arguments: str) -> None:
    assert (
        build_parser().parse_args(shlex.split(arguments)).command == arguments.split(maxsplit=1)[0]
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_commands_help_shows_it(name: str) -> None:
    shown = commands()[name].format_help()
    assert all(f"{PROGRAM} {arguments}" in shown for _, arguments in EXAMPLES[name])
    assert f"{PROGRAM} {EXAMPLES[name][0][1]}" in build_parser().format_help()


def test_the_readmes_commands_by_hand_are_the_programs_own() -> None:
    """tests/bare.py runs them on bare machines."""
    first, *commands_by_hand = bare.by_hand()
    assert first == "make build"
    found = []
    for each in commands_by_hand:
        program, *arguments = each.removesuffix(" &").split()
        assert program == ".venv/bin/tcpip-bypass-node"
        found.append(build_parser().parse_args(arguments).command)
    assert found.index("load") < found.index("join") < found.index("install") < found.index("gc")
    assert {"estimate", "check", "status"} <= set(found)


@pytest.mark.parametrize(
    ("line", "exits", "is_well"),
    [
        ("false", 0, False),
        ("sh -c 'exit 1' check", 0, False),  # it is no command of the node program
        ("./program check", 1, True),
        ("./program check --before-install", 2, False),
        ("./program status", 1, True),
        ("./program load", 1, False),
        ("./program gc --adopt", 1, False),
        ("./program gc --adopt; no container runtime", 1, True),
        ("./program status --watch", 0, True),
        ("./program status --watch", 1, False),
    ],
)
def test_what_ends_the_readmes_commands(
    tmp_path: Path, line: str, exits: int, *, is_well: bool
) -> None:
    command, _, said = line.partition("; ")
    (tmp_path / "program").write_text(f"#!/bin/sh\necho {said}\nexit {exits}\n")
    (tmp_path / "program").chmod(0o755)
    argv = ["sh", "-c", f"set -e\n{bare._expected(command)}"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode == 0) == is_well, done


DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), manifests.ESTIMATE)
# What stands for something of the reader's.
PLACEHOLDERS = {
    "NAME...": "node-1",
    "NODE": "node-1",
    "NAME": "k3s",
    "image.repository=...": "image.repository=registry/tcpip-bypass",
    "install ...": "install tcpip-bypass install/chart",
}
# Only an API server can say more than that the command exists and has these options.
OF_UPGRADE = {"--install", "--reuse-values"}  # that `helm template` has not
NEEDS_SERVER = {"kubectl exec", "kubectl rollout", "kubectl logs", "helm uninstall"}
UNREACHABLE = "http://127.0.0.1:1"
KUBECONFIG = {
    **{"apiVersion": "v1", "kind": "Config", "current-context": "none"},
    "clusters": [{"name": "none", "cluster": {"server": UNREACHABLE}}],
    "contexts": [{"name": "none", "context": {"cluster": "none", "user": "none"}}],
    "users": [{"name": "none", "user": {}}],
}


def shown(documents: Iterable[Path] = DOCUMENTS) -> Iterator[str]:
    """Each line of helm or kubectl in a block of commands, or in the comment after one."""
    for path in documents:
        text = path.read_text().replace("\\\n#", "")
        for line in re.findall(r"^#? {4,}(\w.*)$", text, re.MULTILINE):
            command, _, comment = line.partition(" # ")
            found = re.search(r"(?:helm|kubectl) .*", comment)
            for each in (command, found[0] if found else ""):
                if re.match(r"(helm|kubectl) ", each):
                    yield each.strip()


COMMANDS = sorted(set(shown()))


def words(line: str) -> list[list[str]]:
    """A line's commands, in which one feeds the next, with something in place of placeholders."""
    for placeholder, value in PLACEHOLDERS.items():
        line = line.replace(placeholder, value)
    return [shlex.split(each) for each in line.split(" | ")]


def verb(argv: list[str]) -> str:
    """As in "kubectl patch", whatever options stand before it."""
    tool, *rest = argv
    while rest[0].startswith("-"):
        rest = rest[2:]
    return f"{tool} {rest[0]}"


def tried(argv: list[str], folder: Path, stdin: str = "") -> tuple[int, str, str]:
    """Exit status, what was printed, and what was complained of."""
    (folder / "kubeconfig").write_text(json.dumps(KUBECONFIG))
    done = subprocess.run(
        [manifests.TOOLS / argv[0], *argv[1:]],
        input=stdin,
        cwd=ROOT,
        env={"KUBECONFIG": str(folder / "kubeconfig"), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_lines_are_found() -> None:
    assert len(COMMANDS) > 15
    verbs = {verb(argv) for line in COMMANDS for argv in words(line)}
    assert verbs >= NEEDS_SERVER
    files = {"kubectl apply", "kubectl delete", "kubectl patch", "kubectl label"}
    assert verbs - NEEDS_SERVER == files | {"helm install", "helm upgrade", "helm template"}


def test_the_readme_begins_with_one_node() -> None:
    label, apply, *_ = shown([ROOT / "README.md"])
    folder = manifests.OVERLAYS / "one-node"
    assert apply == f"kubectl apply -k {folder.relative_to(ROOT)}"
    selector = manifests.pod_spec(manifests.kustomized(folder))["nodeSelector"]
    key, _, value = label.removeprefix("kubectl label node NODE ").partition("=")
    assert selector[key] == value


@pytest.mark.parametrize("line", COMMANDS)
def test_the_tools_take_it_until_there_is_no_server(line: str, tmp_path: Path) -> None:
    printed = ""
    for argv in words(line):
        status, printed, complained = tried(argv, tmp_path, printed)
        unreachable = "127.0.0.1:1" in complained and "refused" in complained
        assert status == 0 or unreachable, complained


def without_server(argv: list[str]) -> list[str]:
    """The same, as far as the tool does it alone; patch and label take their object from stdin."""
    tool, command = verb(argv).split()
    rest = argv[argv.index(command) + 1 :]
    if tool == "helm":
        return ["helm", "template", *(each for each in rest if each not in OF_UPGRADE)]
    if "-k" in rest:
        return ["kubectl", "kustomize", rest[rest.index("-k") + 1]]
    if command in ("apply", "delete"):
        return ["kubectl", "label", "--local", *rest, "tried=yes", "-o", "yaml"]
    _kind, _name, *options = rest
    return ["kubectl", command, "--local", "-f", "-", *options, "-o", "yaml"]


def meant(argv: list[str]) -> str:
    """The object that patch or label is about; empty for the other commands."""
    command = verb(argv).split()[1]
    if command not in ("patch", "label"):
        return ""
    kind, name = argv[argv.index(command) + 1 :][:2]
    if kind == "node":
        return json.dumps({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    (found,) = [
        each
        for each in manifests.documents(manifests.DAEMONSET)
        if (each["kind"].lower(), each["metadata"]["name"]) == (kind, name)
    ]
    return json.dumps(found)


def needs_server(argv: list[str]) -> bool:
    """Also to delete what is named, and not in a file."""
    is_named = verb(argv) == "kubectl delete" and not {"-f", "-k"} & {*argv}
    return is_named or verb(argv) in NEEDS_SERVER


LOCAL = [each for each in COMMANDS if not needs_server(words(each)[0])]


@pytest.mark.parametrize("line", LOCAL)
def test_what_the_tools_make_of_it_alone(line: str, tmp_path: Path) -> None:
    printed = ""
    for argv in words(line):
        given = printed or meant(argv)
        status, printed, complained = tried(without_server(argv), tmp_path, given)
        assert status == 0, complained
        objects = [each for each in yaml.safe_load_all(printed) if each]
        assert objects
        assert printed != given
    if "configmap" in line:
        assert switch.parse(objects[0]["data"]) == switch.Switch(paused=True)


@pytest.mark.parametrize("line", [each for each in COMMANDS if " -- " in each])
def test_what_is_run_in_the_pod_is_the_programs_own(line: str) -> None:
    (argv,) = words(line)
    program, *arguments = argv[argv.index("--") + 1 :]
    assert program == PROGRAM
    assert build_parser().parse_args(arguments).command == arguments[0]
