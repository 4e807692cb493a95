# SPDX-License-Identifier: Apache-2.0
"""What is on a node: runtime, network configuration, plugin, programs, pods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cni_plugin import names, netconf
from install.program import canary, exits, in_force, report, selftest, switch
from install.program.check import finding
from install.program.check import pods as of_pods
from install.program.check.finding import THE_PROGRAM, Finding
from install.program.check.pods import PodState
from install.program.conf_dir import ConfDir
from install.program.freshness import reason_to_load, reason_to_try
from install.program.installer import Places, check_is_looked_for, entry
from install.program.plugin_files import DoesNotRun, InstallError

if TYPE_CHECKING:
    from install.program.node import Node

SHOWN = 5  # pods named in one line; --json has all
_NEEDS = "mend that: it needs a folder that allows execution, and no library of the node's"
_ANOTHER_KERNEL = "another kernel may allow more: tcpip-bypass-node selftest"
_AGAIN = "try again when the node is less busy"


@dataclass(frozen=True)
class Asked:
    """Whose state is asked for."""

    node: Node
    places: Places
    cri_sockets: Sequence[Path]
    host_root: Path

    @property
    def socket(self) -> Path | None:
        return next((each for each in self.cri_sockets if each.is_socket()), None)


def before_install(asked: Asked) -> Iterator[Finding]:
    """Whether what is to come finds what it needs; the self-test takes some seconds."""
    yield _runtime(asked)
    yield _conflist(asked)
    yield _runs(asked)
    verdict = selftest.run(mends=asked.node.mends_fionread)
    hint = _AGAIN if any(check.is_late for check in verdict.checks) else _ANOTHER_KERNEL
    yield _mode("mode", verdict.mode, "; ".join(verdict.reasons), None, hint)


def installed(asked: Asked, facts: report.Facts) -> Iterator[Finding]:
    """Whether everything is in place."""
    yield _runtime(asked)
    yield _conflist(asked)
    yield _plugin(asked)
    yield _runs(asked, facts.plugin_problem)
    yield _entry(asked)
    yield _programs(asked, facts)
    yield _joiner(facts)
    yield from _traced(asked, facts)
    is_there = (asked.node.state_dir / names.NODE_JSON).exists()
    is_tried = is_there and reason_to_try(asked.node) is None
    hint = _ANOTHER_KERNEL if is_tried else "tcpip-bypass-node load"
    yield _mode("mode", facts.mode, facts.reason, facts.named_mode, hint)
    if facts.paused_by:
        by_switch = report.SWITCH in facts.paused_by
        hint = report.undoing(facts.paused_by, "tcpip-bypass-node resume")
        link = finding.SWITCH if by_switch else finding.CHECKS
        by = "the cluster's switch" if by_switch else "an operator"
        yield finding.less("paused", f"{by} lets all bytes of this node go by TCP", hint, link)


def _runtime(asked: Asked) -> Finding:
    if asked.socket:
        return finding.well("runtime", str(asked.socket), finding.INSTALLING)
    listed = ", ".join(map(str, asked.cri_sockets))
    hint = "name it with --cri-socket; without it, pods that run already are not taken in"
    return finding.less("runtime", f"none of {listed} is there", hint, finding.INSTALLING)


def _conflist(asked: Asked) -> Finding:
    folder = asked.places.conf_dir
    try:
        found = ConfDir(folder).would_put_in(entry(asked.node.bpffs, asked.node.state_dir, None))
    except OSError as error:
        return finding.broken("conflist", str(error), "name its folder with --cni-conf-dir")
    problems = "; ".join(found.problems)
    if found.conflist is None:
        hint = "mend the file, or name the folder that the runtime uses with --cni-conf-dir"
        return finding.broken("conflist", problems, hint, finding.OUR_ENTRY)
    if problems:
        hint = "mend or remove that file: containerd has no network while it is the first"
        return finding.less("conflist", f"{found.conflist}; {problems}", hint, finding.OUR_ENTRY)
    return finding.well("conflist", str(found.conflist), finding.OUR_ENTRY)


def _plugin(asked: Asked) -> Finding:
    files = asked.places.files
    hint = "tcpip-bypass-node install"
    try:
        if files.is_intact():
            return finding.well("plugin", str(files.link), THE_PROGRAM)
    except (InstallError, OSError) as error:
        return finding.broken("plugin", str(error), hint, THE_PROGRAM)
    there = files.link.is_symlink() or files.link.exists()
    found = "is not the one that comes with this program" if there else "is not there"
    return finding.broken("plugin", f"{files.link} {found}", hint, THE_PROGRAM)


def _runs(asked: Asked, problem: str = "") -> Finding:
    """``problem`` is what the last installation has met, of a plugin that may not be here."""
    found = _tried(asked)
    if not problem or found.status == exits.NOT:
        return found
    return finding.broken("plugin runs", problem, _NEEDS, THE_PROGRAM)


def _tried(asked: Asked) -> Finding:
    """Tried: the plugin that the runtime calls; when there is none, the one to be installed."""
    files = asked.places.files
    try:
        check_is_looked_for(asked.places)
    except (DoesNotRun, OSError) as error:
        hint = "install it where the runtime looks"
        return finding.broken("plugin runs", str(error), hint, THE_PROGRAM)
    is_installed = files.link.exists() and not files.has_stub
    if not is_installed and not (files.source / names.PLUGIN).is_file():
        hint = "run make build, or name the frozen plugin's folder with --plugin-dir"
        return finding.broken("plugin runs", f"no plugin in {files.source}", hint, THE_PROGRAM)
    try:
        if is_installed:
            files.check_runs()
        else:
            files.check_source_runs()
    except DoesNotRun as error:
        return finding.broken("plugin runs", str(error), _NEEDS, THE_PROGRAM)
    except InstallError as error:
        hint = "try again; `install` tries it, too"
        return finding.less("plugin runs", str(error), hint, THE_PROGRAM)
    return finding.well("plugin runs", "it answers VERSION on this node", THE_PROGRAM)


def _entry(asked: Asked) -> Finding:
    folder = asked.places.conf_dir
    try:
        ours = ConfDir(folder).ours()
    except OSError as error:
        return finding.broken("entry", str(error), "mend that file", finding.OUR_ENTRY)
    if ours is None:
        found = f"the configuration that the runtime uses, in {folder}, is without us"
        return finding.broken("entry", found, "tcpip-bypass-node install", finding.OUR_ENTRY)
    return finding.well("entry", str(ours.path), finding.OUR_ENTRY)


def _programs(asked: Asked, facts: report.Facts) -> Finding:
    if reason := reason_to_load(asked.node):
        hint = "tcpip-bypass-node load"
        return finding.broken("programs", reason, hint, finding.KERNEL_TRIED)
    assert facts.current
    return finding.well(
        "programs", f"generation {facts.current.number} is whole", finding.KERNEL_TRIED
    )


def _joiner(facts: report.Facts) -> Finding:
    if not facts.joining_problem:
        return finding.well("joiner", "runs")
    hint = "until then all bytes go by TCP"
    return finding.broken("joiner", facts.joining_problem, hint)


def _traced(asked: Asked, facts: report.Facts) -> Iterator[Finding]:
    """The programs that the mode rests on: the joiner's canary, asked here."""
    if facts.current not in facts.generations:
        return
    is_mended = asked.node.is_mended
    if not is_mended and not facts.current.traces():
        return
    hint = "sysctl kernel.ftrace_enabled=1, then tcpip-bypass-node load; sockets go back to TCP"
    try:
        why_not = canary.try_programs(facts.current)
    except OSError as error:
        why_not = f"it could not be tried: {error}"
    if why_not:
        name = "fionread" if is_mended else "splice"
        yield finding.broken(name, why_not, hint, finding.MEND)
    elif not is_mended:
        yield finding.well("splice", "it is refused on sockets that bypass", finding.MEND)
    elif facts.lost_answers:
        found = f"it is mended, but {facts.lost_answers} answers could not be written"
        hint = "these reads were told the kernel's wrong number; `fionread` of our entry: leave"
        yield finding.less("fionread", found, hint, finding.MEND)
    else:
        yield finding.well("fionread", "the kernel gets it wrong, and it is mended", finding.MEND)


def _mode(
    name: str,
    allowed: str,
    reason: str,
    named: tuple[str, str] | None,
    hint: str = _ANOTHER_KERNEL,
) -> Finding:
    """``named`` is the mode that is forced, and what forces it; ``hint`` is for less than full."""
    if named is not None:
        return _forced(name, named, allowed, reason)
    found = allowed if allowed == "full" else f"{allowed}: {reason}"
    hint = "" if allowed == "full" else hint
    return Finding(name, exits.of_mode(allowed), found, hint, finding.KERNEL_TRIED)


def _forced(name: str, named: tuple[str, str], allowed: str, reason: str) -> Finding:
    mode, by = named
    hint, link = "key `mode` of our entry", finding.OUR_ENTRY
    if by == netconf.SWITCH:
        hint, link = f"key `mode` of the ConfigMap {switch.CONFIGMAP}", finding.SWITCH
    status = exits.of_forced(mode, allowed)
    hint = "" if status == exits.WELL else hint
    found = f"{mode}, forced by {by}; the self-test allows {allowed}: {reason}"
    return Finding(name, status, found, hint, link)


def pods(asked: Asked, facts: report.Facts) -> tuple[Finding, list[PodState]]:
    """How many pods are accelerated, and each one's state; without a runtime, those recorded."""
    from install.program.agent.cri import CriError  # noqa: PLC0415 - see there

    found = of_pods.recorded(facts)
    unseen = ""
    try:
        ours = ConfDir(asked.places.conf_dir).ours()
        if asked.socket and ours:
            now = in_force.in_force(asked.node.state, ours.entry, ours.path)
            found += of_pods.others(of_pods.sandboxes_of(asked.socket), found, now)
    except (CriError, OSError, ValueError) as error:
        unseen = f"others are not known: {error}"
    return _summary(found, unseen), found


def _summary(found: Sequence[PodState], unseen: str) -> Finding:
    counts = {state: sum(each.state == state for each in found) for state in of_pods.STATES}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"
    said = "; ".join(filter(None, (said, unseen)))
    wrong = [each for each in found if each.state in of_pods.WRONG]
    if wrong:
        named = [f"{each.namespace}/{each.name} {each.state}: {each.why}" for each in wrong[:SHOWN]]
        return finding.less("pods", said, "; ".join(named), finding.WHY_NOT)
    if unseen:
        return finding.less("pods", said, "look at the runtime's log", finding.WHY_NOT)
    return finding.well("pods", said, finding.WHY_NOT)
