# SPDX-License-Identifier: Apache-2.0
"""What is run on each kernel, and what each run says about it.

A suite is a command that prints one JSON object on stdout and talks on stderr. It runs in the
guest; what it printed is judged on this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cni_plugin import names

PROJECT = Path(__file__).resolve().parents[2]
FUZZ_PROGRAM = PROJECT / "build/kernels/stream"  # compiled on this machine
_BIN = PROJECT / ".venv/bin"
FULL, PROXY_ONLY, OFF = names.MODES


# Differ on 5.10 and not on this machine, so that docs/limits.md has them below its table.
OLD_KERNELS_ONLY = {"zerocopy_set_late"}
_NEARLY_ALL = 0.98  # a message in a second goes by TCP, for conntrack


class Failed(Exception):
    """A suite did not do its work; the message says how."""


@dataclass(frozen=True)
class Finding:
    """What a suite found: in a few words, what is wrong in itself, and the self-test's modes that
    agree with it."""

    summary: str
    agreeing_modes: frozenset[str]
    problems: tuple[str, ...] = ()
    known: tuple[str, ...] = ()  # what the suite holds against this kernel, and need not


@dataclass(frozen=True)
class Suite:
    """One command, how to judge what it printed, and how many seconds of an emulated CPU it may
    take."""

    name: str
    command: tuple[str, ...]
    judge: Callable[[Any], Finding]
    timeout_s: int
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of one suite in the guest. `exit_code` is None when it ran out of time."""

    suite: str
    exit_code: int | None
    seconds: float
    stdout: str
    stderr: str

    def finding(self) -> Finding:
        """The judgement of what was printed. Raises Failed."""
        if self.exit_code is None:
            raise Failed(f"ran out of time after {self.seconds:.0f} s")
        try:
            printed = json.loads(self.stdout)
        except ValueError as error:
            raise Failed(f"exit status {self.exit_code} and no JSON: {error}") from error
        finding = SUITES[self.suite].judge(printed)
        if self.exit_code and not (finding.problems or finding.known):
            raise Failed(f"exit status {self.exit_code}")
        return finding


def _selftest(printed: dict[str, Any]) -> Finding:
    failed = [check["name"] for check in printed["checks"] if not check["ok"]]
    summary = f"{printed['mode']} ({', '.join(failed)} wrong)" if failed else printed["mode"]
    summary += ", FIONREAD mended" if printed.get("mended") else ""
    # Its exit status says no more than the mode: install/program/exits.py.
    return Finding(summary, frozenset({printed["mode"]}), known=tuple(failed))


def _selftest_left(printed: dict[str, Any]) -> Finding:
    """Without the mend; with it, as the other suites are, another mode may be right."""
    return replace(_selftest(printed), agreeing_modes=frozenset(names.MODES))


def _probe(printed: dict[str, Any]) -> Finding:
    sent, bypassed = printed["sent_bytes"], printed["bypassed_bytes"]
    shares = {hop: bypassed.get(hop, 0) / (sent or 1) for hop in ("inbound", "outbound")}
    summary = ", ".join(f"{hop} {share:.0%} bypassed" for hop, share in shares.items())
    agreeing = frozenset(names.MODES if all(shares.values()) else {OFF})
    ends = printed["mptcp_joined"]
    problems = [f"MPTCP's fallback, {name}: {ends[name]} ends" for name in ends if ends[name] != 2]
    from_before = printed["from_before"]
    summary += ", connections from before join" if from_before else ""
    if from_before not in {0, 2}:
        problems.append(f"a connection from before: {from_before} ends")
    return Finding(summary, agreeing, tuple(problems))


def _semantics(printed: dict[str, Any]) -> Finding:
    """Applications may be touched exactly where FIONREAD is right; nothing that differs may be
    missing in docs/limits.md."""
    differing = printed["differing"]
    summary = f"{len(differing)} of {printed['scenarios']} behaviours differ"
    if "unread_bytes" in differing:
        summary += ", FIONREAD among them"
    undocumented = set(printed["undocumented"])
    known = undocumented & OLD_KERNELS_ONLY
    problems = [f"not in docs/limits.md: {name}" for name in sorted(undocumented - known)]
    return Finding(
        summary,
        frozenset({PROXY_ONLY if "unread_bytes" in differing else FULL}),
        (*problems, *printed["troubles"]),
        tuple(known),
    )


def _fuzz(printed: dict[str, Any]) -> Finding:
    wrong = tuple(
        f"{kind}: {json.dumps(case)}"
        for kind in ("mismatches", "lost", "hangs", "crashes")
        for case in printed[kind]
    )
    summary = (
        f"{printed['connections']} connections, {printed['bytes'] / 1e6:.0f} MB,"
        f" {printed['bypassed_share']:.0%} bypassed, {len(wrong)} wrong"
    )
    return Finding(summary, frozenset({OFF} if wrong else names.MODES), wrong)


def _ktls(printed: dict[str, Any]) -> Finding:
    if not printed["supported"]:
        return Finding("no kTLS", frozenset(names.MODES))
    problems = []
    if printed["wrong"]:
        problems.append(f"{printed['wrong']} messages came out wrong")
    if not printed.get("encrypted", True):
        problems.append("plaintext went past kTLS")
    if not (printed["bypassed"] and printed["ineligible"]):
        problems.append("it was not tried: nothing was bypassed before, or left on TCP after")
    summary = f"refused ({printed['refused']}), right" if "refused" in printed else "encrypted"
    return Finding(summary, frozenset({OFF} if problems else names.MODES), tuple(problems))


def _memory(printed: list[dict[str, Any]]) -> Finding:
    """Whatever the container holds, nothing is killed, nothing lost and nothing forgotten. Where
    there is room, or only cache in its place, bytes bypass; else about as much lies unread as over
    TCP, which is 3.2 MB."""
    problems = []
    for found in printed:
        name = found["situation"]
        broken = any(found[key] for key in ("killed", "missing", "errors", "wrong"))
        if broken or found["received"] != found["sent"]:
            problems.append(f"{name}: {json.dumps(found)}")
        if name in ("room", "cached") and not found["bypassed"]:
            problems.append(f"{name}: nothing was bypassed")
        if name in ("tight", "full") and found["charged"] > 6e6:
            problems.append(f"{name}: {found['charged']} bytes are unread")
    shares = ", ".join(f"{found['situation']} {found['charged'] / 1e6:.1f}" for found in printed)
    return Finding(f"unread, MB: {shares}", frozenset(names.MODES), tuple(problems))


def _fionread(printed: dict[str, Any]) -> Finding:
    """Every answer is TCP's, also a 32-bit program's; and none was more than there was while
    another thread was reading."""
    problems = list(printed["wrong"])
    if not (printed["bypassed"] and printed["paused"]):
        problems.append("it was not tried: nothing was bypassed, or by TCP while paused")
    beside = printed["beside_a_reader"] or {"above": -1, "missing": -1}
    if beside["above"] or beside["missing"]:
        problems.append(f"beside a reader: {json.dumps(beside)}")
    if printed["compat"] != {family: [321, 123] for family in ("AF_INET", "AF_INET6")}:
        problems.append(f"32-bit programs: {json.dumps(printed['compat'])}")
    how = f"not mended: {printed['why_not_mended']}" if printed["why_not_mended"] else "mended"
    summary = f"{printed['states']} states, {len(printed['wrong'])} wrong ({how})"
    summary += f"; alone {printed['alone']['AF_INET']}"
    agreeing = {PROXY_ONLY, OFF} if printed["wrong"] else names.MODES
    return Finding(summary, frozenset(agreeing), tuple(problems))


# What an upgrade and an unload leave of a generation with two members.
_ENDS = {
    "upgraded": {"members": 2, "generations": ["gen-2"], "then": 700},
    "unloaded": {"members": 2, "is_sockhash_empty": True, "pins": [], "links": 0, "then": 700},
}


def _mend_life(printed: dict[str, Any]) -> Finding:
    """FIONREAD is right for a member whatever becomes of the joiner, through upgrade, pause and
    unload; the last leaves no member, pin or link. When it can be mended no more, members have left
    soon, and it is right again. The times allow for an emulated CPU."""
    members = ("member", "joiner killed", "member again", "member of the second")
    problems = [
        f"{name}: FIONREAD {printed[name]}"
        for name in (*members, "paused", "resumed")
        if printed[name] != 700
    ]
    problems += [
        f"{name}: {json.dumps(printed[name])}"
        for name, wanted in _ENDS.items()
        if printed[name] != wanted
    ]
    losses = {name: printed[name] for name in ("silenced", "unpinned", "unmounted")}
    for name, loss in losses.items():
        if loss["noticed_s"] > 4 or loss["left_s"] > 20 or loss["then"] != 700:
            problems.append(f"{name}: {json.dumps(loss)}")
    noticed = ", ".join(
        f"{name} {loss['noticed_s']} s, left {loss['left_s']} s" for name, loss in losses.items()
    )
    return Finding(f"noticed: {noticed}", frozenset(names.MODES), tuple(problems))


def _passes(printed: dict[str, Any]) -> Finding:
    problems = tuple(printed["problems"])
    summary = f"{printed['passes']} passes, {printed['joined']} joined, {printed['left']} left"
    return Finding(summary, frozenset({OFF} if problems else names.MODES), problems)


def _apps(printed: dict[str, Any]) -> Finding:
    """Every byte is right, whatever the mode; and where it is full, what can bypass does."""
    problems = [
        f"{found['name']} on {found['hop']}: {found['error']}"
        for found in printed["found"]
        if found["error"]
    ]
    bypassed = sum(found["bypassed_bytes"] for found in printed["found"])
    share = printed["go_share"]
    right = len(printed["found"]) - len(problems)
    summary = f"{printed['mode']}: {right} right, {bypassed / 1e6:.0f} MB bypassed"
    if share is not None:
        summary += f"; Go server inbound {share:.1%}"
        if share < _NEARLY_ALL:
            problems.append(f"a Go server's bytes bypass only to {share:.1%}")
    return Finding(summary, frozenset({printed["mode"]}), tuple(problems))


def _transfers(printed: dict[str, Any]) -> Finding:
    right, errors = printed["right"], printed["errors"]
    summary = f"{printed['mode']}: {right} right, {len(errors)} failed"
    summary += f", {printed['bypassed_bytes'] / 1e6:.0f} MB bypassed"
    return Finding(summary, frozenset({printed["mode"]}), tuple(errors))


_PASSES = (f"{_BIN}/python", "-m", "tests.passes")
_APPS = (f"{_BIN}/python", "-m", "tests.kernels.apps")

_SELFTEST = (f"{_BIN}/tcpip-bypass-node", "selftest", "--json")

_ALL = (
    Suite("selftest", _SELFTEST, _selftest, 900),
    Suite("selftest-left", (*_SELFTEST, "--fionread", "leave"), _selftest_left, 900),
    Suite("probe", (f"{_BIN}/python", "-m", "tests.kernels.probe"), _probe, 900),
    Suite("ktls", (f"{_BIN}/python", "-m", "tests.kernels.ktls"), _ktls, 120),
    Suite("memory", (f"{_BIN}/python", "-m", "tests.kernels.memory"), _memory, 180),
    Suite(
        "fionread", (f"{_BIN}/python", "-m", "tests.kernels.fionread", "100000"), _fionread, 1800
    ),
    Suite("mend-life", (f"{_BIN}/python", "-m", "tests.kernels.mend_life"), _mend_life, 1800),
    Suite("apps", _APPS, _apps, 5400, {"TB_PATIENCE_S": "400", "TB_SILENCE_S": "120"}),
    Suite("transfers", (*_APPS, "--transfers", "100"), _transfers, 3600),
    Suite("ktls-joins", (*_PASSES, "churn", "120", "ktls"), _passes, 900),
    Suite("churn", (*_PASSES, "churn", "240"), _passes, 900),
    Suite("mptcp", (*_PASSES, "mptcp", "60"), _passes, 600),
    Suite("leaving", (*_PASSES, "leaving", "500"), _passes, 900),
    Suite(
        "semantics",
        (f"{_BIN}/python", "-m", "tests.semantics", "--json", "--jobs", "12"),
        _semantics,
        1800,
        {"TB_SETTLE_S": "0.25"},
    ),
    Suite(
        "fuzz",
        (
            *(f"{_BIN}/python", "-m", "tests.fuzz", "--program", str(FUZZ_PROGRAM)),
            *("--seed", "1", "--seconds", "30", "--at-once", "12", "--pause-flips"),
        ),
        _fuzz,
        300,
    ),
)
SUITES = {suite.name: suite for suite in _ALL}
# A run without --suite leaves these out. They try the joiner, for minutes.
_UNUSUAL = (
    *("mend-life", "transfers"),
    *("ktls-joins", "churn", "mptcp", "leaving"),  # for docs/design/late-join.md
)
USUAL = [name for name in SUITES if name not in _UNUSUAL]
WITH_PARAMETERS = ["selftest"]
