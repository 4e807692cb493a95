# SPDX-License-Identifier: Apache-2.0
"""docs/kernels.md: what each kernel gets by default, from what the suites printed there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cni_plugin import names
from install.program.selftest import FIONREAD, SPLICE
from tests.kernels import images
from tests.kernels.machine import Run
from tests.kernels.suites import PROJECT, WITH_PARAMETERS, Failed

PATH = PROJECT / "docs/kernels.md"
SUITES = ("selftest", "selftest-left", "probe")  # what a line is made of

# The one thing that no kernel tells by itself.
SHIPPED_BY = {
    "5.10": "Debian 11",
    "6.1": "Debian 12, AL2023",
    "6.12": "Debian 13, RHEL 10, AL2023 (6.12)",
    "6.17": "Ubuntu 25.10",
    "6.18": "Debian 13's backports",
    "7": "Debian 13's backports",
}
HEAD = """\
# Kernels

Written by `make test-kernels`; do not edit. Debian's kernels, each as its self-test found it, in
mode `auto`. Others backport other faults and mends: a node's own self-test decides. Debian has no
5.15, 6.6 or 6.8, so these were not tried. FIONREAD unmended: A misses bypassed bytes, B TCP's, C
none.

"""
PROGRAMS = "programs right"  # a column of runs that have suite `apps`
COLUMNS = (
    *("kernel", "shipped by", "FIONREAD", "mended", "splice refused", "MPTCP fallback joins"),
    *("connections from before join", "mode", "hops"),
)
UNKNOWN = "-"
RIGHT = "C"  # the class of kernels whose FIONREAD needs no mend
_YES_NO = {True: "yes", False: "no", None: UNKNOWN}
_FULL, _PROXY_ONLY, _OFF = names.MODES
_HOPS = {_FULL: "all three", _PROXY_ONLY: "sidecar to sidecar", _OFF: "none"}


def written(runs: Sequence[Run]) -> str:
    """The page. Raises Failed if a kernel lacks a suite, or the suite failed there."""
    lines = [COLUMNS, *(_line(run) for run in runs)]
    programs = [_programs(run) for run in runs]
    if any(programs):
        cells = (PROGRAMS, *(each or UNKNOWN for each in programs))
        lines = [(*line, cell) for line, cell in zip(lines, cells)]
    lines.insert(1, ("-",) * len(lines[0]))
    table = "".join(f"|{'|'.join(line)}|\n" for line in lines)  # no blanks: tests.words counts bars
    reasons = "".join(f"- {run.kernel.title}: `{why}`\n" for run in runs if (why := _why(run)))
    return HEAD + table + (f"\nNot `full`, because:\n\n{reasons}" if reasons else "")


def _printed(run: Run) -> dict[str, dict[str, Any]]:
    """What the suites printed, by name."""
    wanted = WITH_PARAMETERS if run.kernel.parameters else SUITES
    outcomes = {outcome.suite: outcome for outcome in run.outcomes}
    for name in wanted:
        if name not in outcomes:
            raise Failed(f"{run.kernel.title} has not run {name}")
        outcomes[name].finding()
    return {name: json.loads(outcomes[name].stdout) for name in wanted}


def _programs(run: Run) -> str:
    """Of the real programs, those that were right on every hop; empty where none was run."""
    for outcome in run.outcomes:
        if outcome.suite == "apps":
            outcome.finding()
            found = json.loads(outcome.stdout)["found"]
            wrong = {each["name"] for each in found if each["error"]}
            all_names = {each["name"] for each in found}
            return f"{len(all_names - wrong)}/{len(all_names)}"
    return ""


def _line(run: Run) -> tuple[str, ...]:
    printed = _printed(run)
    found = printed["selftest"]
    by_itself = fionread_class(printed["selftest-left"] if found["mended"] else found)
    mended = {UNKNOWN: UNKNOWN, RIGHT: "not needed"}.get(by_itself, _YES_NO[found["mended"]])
    probed = printed.get("probe", {})
    ends = probed.get("mptcp_joined", {})
    return (
        run.kernel.title,
        SHIPPED_BY.get(images.plain(run.kernel.series), UNKNOWN),
        by_itself,
        mended,
        _YES_NO[_checks(found).get(SPLICE)],
        _YES_NO[all(count == 2 for count in ends.values()) if ends else None],
        _YES_NO[probed["from_before"] == 2 if ends else None],
        f"`{found['mode']}`",
        _HOPS[found["mode"]],
    )


def fionread_class(printed: Mapping[str, Any]) -> str:
    """The class by what a self-test without the mend found: which bytes FIONREAD does not see."""
    bypassed, tcp, ipv6 = (_checks(printed).get(name) for name in FIONREAD)
    if None in (bypassed, tcp, ipv6):
        return UNKNOWN  # the programs did not load
    if bypassed and tcp:
        return RIGHT if ipv6 else "IPv6 wrong"
    return "A" * (not bypassed) + "B" * (not tcp)


def _checks(printed: Mapping[str, Any]) -> dict[str, bool]:
    return {check["name"]: check["ok"] for check in printed["checks"]}


def _why(run: Run) -> str:
    """The first reason why the mode is less than `full`, without the verifier's further lines."""
    reasons = _printed(run)["selftest"]["reasons"]
    first, is_cut, _ = reasons[0].partition(" | ") if reasons else ("", "", "")
    return " ".join([*first.split(), *(["..."] if is_cut else [])])
