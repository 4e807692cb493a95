# SPDX-License-Identifier: Apache-2.0
"""The command `check`, from its options."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from install.program import VERSION, exits, host, report
from install.program.agent.command import sockets_of
from install.program.check import kernel
from install.program.check import node as of_node
from install.program.check.finding import Finding
from install.program.check.node import Asked
from install.program.check.pods import PodState

if TYPE_CHECKING:
    from install.program.installer import Places
    from install.program.node import Node

_MARKS = ("✔", "!", "✘")


def options(parser: argparse.ArgumentParser) -> None:
    """Adds those that only `check` has."""
    parser.add_argument(
        "--before-install",
        action="store_true",
        help="only whether this node is fit; tries the kernel, which takes some seconds",
    )
    parser.add_argument("--json", action="store_true", help="for machines, and with every pod")


def run(node: Node, places: Places, arguments: argparse.Namespace) -> int:
    """Prints what was found; returns the exit status, the gravest of the findings'."""
    asked = Asked(node, places, sockets_of(arguments), host_root(places.host_proc))
    findings, pods = look(asked, before_install=arguments.before_install)
    if arguments.json:
        print(json.dumps(as_json(findings, pods), indent=1))
    else:
        print("\n".join(_lines(findings)))
    return gravest(findings)


def look(asked: Asked, *, before_install: bool) -> tuple[list[Finding], list[PodState]]:
    """Every finding, and every pod's state. Raises OSError, LoadError."""
    bpffs = asked.node.bpffs
    findings = list(kernel.check(bpffs, asked.host_root, before_install=before_install))
    if before_install:
        return excused([*findings, *of_node.before_install(asked)]), []
    facts = report.facts(asked.node)
    findings += of_node.installed(asked, facts)
    summary, pods = of_node.pods(asked, facts)
    return excused([*findings, summary]), pods


def excused(findings: list[Finding]) -> list[Finding]:
    """What would mend FIONREAD is missed only where the mode is not full for want of it."""
    modes = [each.status for each in findings if each.name == "mode"]
    if modes != [exits.WELL]:
        return findings
    return [
        replace(each, status=exits.WELL, hint="")
        if each.name in kernel.FOR_THE_MEND and each.status == exits.LESS
        else each
        for each in findings
    ]


def host_root(host_proc: Path) -> Path:
    """The node's root folder: in a pod, that of the node's first process."""
    return Path("/") if host_proc == host.OWN_PROC else host_proc / "1/root"


def gravest(findings: list[Finding]) -> int:
    return max(each.status for each in findings)


def as_json(findings: list[Finding], pods: list[PodState]) -> dict[str, Any]:
    """What `check --json` prints."""
    return {
        "version": VERSION,
        "kernel": platform.release(),
        "node": report.node_name(),
        "status": exits.WORDS[gravest(findings)],
        "findings": [each.as_json() for each in findings],
        "pods": [each.as_json() for each in pods],
    }


def _lines(findings: list[Finding]) -> list[str]:
    width = max(len(each.name) for each in findings)
    lines = []
    for each in findings:
        lines.append(f"{_MARKS[each.status]} {each.name:{width}}  {each.found}")
        if each.hint:
            lines.append(f"  {'':{width}}  -> {each.hint}; {each.link}")
    gravest_one = gravest(findings)
    return [*lines, "", f"{_MARKS[gravest_one]} {exits.WORDS[gravest_one]}"]
