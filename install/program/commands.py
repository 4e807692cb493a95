# SPDX-License-Identifier: Apache-2.0
"""The commands of tcpip-bypass-node, without their command line."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bpf import abi
from bpf.loader import LoadError, Programs
from cni_plugin import attachment, names
from cni_plugin.state import Attachment, Key
from install.program import (
    exits,
    freshness,
    host,
    installer,
    leaving,
    log,
    passes,
    pauses,
    report,
    whole_file,
)
from install.program import selftest as selftests
from install.program import switch as switches
from install.program.agent import bpffs
from install.program.agent.schedule import NotDone
from install.program.generations import Generation, Generations, is_bpffs
from install.program.node import LOCK_PATIENCE_S, Node, NodeError
from install.program.plugin_files import DoesNotRun
from install.program.pods import attached_cgroups, take_out

if TYPE_CHECKING:
    from rich.console import Console

LOOKS, LOOK_S = 2, 0.25  # after a pause, at what is still bypassed
MENDED = "FIONREAD, which this kernel gets wrong, is mended (docs/security.md)"


def selftest(node: Node, *, as_json: bool) -> int:
    """Tries this kernel and prints what was found; changes nothing on the node.

    Returns the exit status, of install/program/exits.py.
    """
    verdict = selftests.run(mends=node.mends_fionread)
    if as_json:
        print(json.dumps(verdict.as_json(), indent=1))
        return exits.of_mode(verdict.mode)
    from rich.table import Table  # noqa: PLC0415 - see status()

    table = Table("", "what", "expected", "found")
    for check in verdict.checks:
        table.add_row("ok" if check.ok else "WRONG", check.what, check.expected, check.found)
    console = _console()
    console.print(table)
    hops = selftests.HOPS[verdict.mode]
    console.print(f"Mode on kernel {platform.release()}: {verdict.mode}: {hops}")
    for fault in verdict.faults:
        console.print(f"  since {fault}")
    if verdict.is_mended:
        console.print(f"  {MENDED}")
    for reason in verdict.reasons:
        console.print(f"  because of {reason}")
    return exits.of_mode(verdict.mode)


def load(node: Node, host_proc: Path = host.OWN_PROC) -> None:
    """Tries the kernel, then makes a new generation current; attached pods move over to it."""
    _mount_bpffs(node, host_proc)
    verdict = selftests.run(mends=node.mends_fionread)
    for reason in verdict.reasons:
        if verdict.is_final:
            log.warning("mode", f"mode {verdict.mode} because of {reason}", mode=verdict.mode)
        else:
            said = f"mode {verdict.mode} until the kernel is tried again, because of {reason}"
            log.warning("untried", said, mode=verdict.mode)
    if _keep_verdict_alone(node, verdict):
        return
    try:
        programs = Programs()
        if verdict.is_mended and (why_not := programs.mend_fionread()):
            raise LoadError(f"FIONREAD is not mended, though it was for the self-test: {why_not}")
        if verdict.mode == names.MODES[0] and programs.blind_to_splice:
            raise LoadError(f"unlike in the self-test: {programs.blind_to_splice}")
    except LoadError:
        with node.locked():
            _write_node_json(node, _meanwhile(node, verdict))
        raise
    with node.locked():
        _write_node_json(node, _meanwhile(node, verdict))
        generations = node.generations
        ours = generations.program_ids()
        # While the old programs are attached: they mend what their sockets leave behind (edge.h).
        before = generations.complete()
        in_use = [each for each in before if not each.is_retired()]
        folders = list(_folders(generations))
        try:
            left = leaving.empty_all([each for each in before if each.is_whole()], folders)
            generation = generations.publish(programs)
        except BaseException:
            for older in in_use:  # they go on as before
                older.set_retired(False)
            raise
        pauses.apply(node)  # ADD waits for the lock: no pod sees programs that should be paused
        try:
            _move_pods(node, generation, ours, verdict.mode)
            for older in left if verdict.mode == names.MODES[-1] else ():
                # The joiner finds no pods any more.
                leaving.stay_behind(older, folders, _lock(node))
        finally:
            # The first edition's, which can only be paused: after this one took the pauses over.
            leaving.empty_all([each for each in before if not each.is_whole()], [])
            generations.remove_idle(_attached_ids(generations))
        if verdict.is_mended:
            log.info("fionread_mended", MENDED)
        _write_node_json(node, verdict, freshness.mark(node, generation))


def _keep_verdict_alone(node: Node, verdict: selftests.Verdict) -> bool:
    """If only the self-test was missing, keeps its verdict and the programs; returns whether so."""
    with node.locked():
        current = node.generations.current()
        is_alone = freshness.reason_to_try(node) and not freshness.reason_to_publish(node)
        if current is None or not (is_alone and _is_enough(node, current, verdict)):
            return False
        _write_node_json(node, verdict, freshness.mark(node, current))
        return True


def _meanwhile(node: Node, verdict: selftests.Verdict) -> selftests.Verdict:
    """The verdict while the programs are the ones before: they may not do what the new ones can."""
    current = node.generations.current()
    if current is None or _is_fit(current, verdict):
        return verdict
    before, _ = node.state.node_mode()
    return replace(verdict, mode=max(before, verdict.mode, key=names.MODES.index))


def _is_fit(current: Generation, verdict: selftests.Verdict) -> bool:
    """Whether these programs may run in the verdict's mode."""
    return (current.is_mended() or not verdict.is_mended) and (
        current.refuses_splice() or verdict.mode != names.MODES[0]
    )


def _is_enough(node: Node, current: Generation, verdict: selftests.Verdict) -> bool:
    """Whether these programs may run in the verdict's mode, and the pods that have them."""
    before, _ = node.state.node_mode()
    return _is_fit(current, verdict) and max(before, verdict.mode, key=names.MODES.index) == before


def _mount_bpffs(node: Node, host_proc: Path) -> None:
    """As the agent does."""
    try:
        if bpffs.mount(node.bpffs, host_proc):
            said = "mounted a bpffs, there was none"
            log.warning("bpffs_mounted", said, path=node.bpffs.parent)
    except NotDone as error:
        raise NodeError(str(error)) from error


def _move_pods(node: Node, generation: Generation, ours: set[int], mode: str) -> None:
    """New connections of attached pods are handled by this generation from now on.

    The self-test's mode holds for them as for new pods, unless their configuration forces one.
    """
    current = attachment.Generation(generation.folder)
    states = {record.pod_id: record for record in node.attachments()}
    for pod in attached_cgroups(ours):
        record = pod.record
        forced = record is not None and record.flags & abi.POD_FORCED
        if record is None or (mode == "off" and not forced):
            pod.take_out()
            if record is not None and (left := states.get(record.id)):
                node.state.remove(Key(left.container_id, left.ifname))
            continue
        if mode == "proxy-only" and not forced:
            record.flags |= abi.POD_PROXY_ONLY
        if record.id in states:
            moved = states[record.id]._replace(
                prog_id=generation.sock_ops_id(), generation=current.name, flags=record.flags
            )
            node.state.write(moved)
        try:
            attachment.move(pod.fd, pod.inode, pod.programs, current, record)
        except OSError as error:
            log.warning(
                "pod_not_moved",
                f"{pod.path} stays on its generation: {error}",
                **log.of(states.get(record.id)),
            )


def _folders(generations: Generations) -> list[Path]:
    """The cgroups of all pods that have our programs."""
    return [pod.path for pod in attached_cgroups(generations.program_ids())]


def _attached_ids(generations: Generations) -> set[int]:
    """The programs of these generations that some pod has."""
    pods = attached_cgroups(generations.program_ids())
    return {each.program.id for pod in pods for each in pod.programs}


def _write_node_json(
    node: Node, verdict: selftests.Verdict, mark: dict[str, Any] | None = None
) -> None:
    tried = {"kernel": platform.release(), "tried": verdict.is_final}
    content = {**verdict.as_json(), **tried, **(mark or {})}
    whole_file.write(node.state_dir / names.NODE_JSON, json.dumps(content, indent=1))


def _lock(node: Node) -> leaving.Locked:
    """The node's, for a process that makes no folder for it."""
    return functools.partial(node.state.locked, LOCK_PATIENCE_S)


def unload(node: Node) -> None:
    """Everything of ours off this node. Open connections go on over TCP.

    A folder of pins that is on no bpffs is not ours, and stays as it is.
    """
    has_pins = is_bpffs(node.bpffs)
    with _locked_if_possible(node):
        generations = node.generations
        ours = generations.program_ids()
        if has_pins:
            generations.withdraw()
        folders = list(_folders(generations))
        for generation in leaving.empty_all(generations.complete(), folders):
            with contextlib.suppress(OSError):  # what is ours goes all the same
                leaving.stay_behind(generation, folders, _lock(node))
        for pod in attached_cgroups(ours):
            pod.take_out()
        for record in node.attachments():  # of programs whose pins are gone
            try:
                take_out(record)
            except OSError as error:
                said = f"our program stays on {record.cgroup}: {error}; run unload again"
                log.warning("attachment_stays", said, **log.of(record))
        if has_pins:
            generations.remove_all()
        for folder in (names.ATTACHMENTS, names.FAILURES, names.VALIDATED):
            shutil.rmtree(node.state_dir / folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            written = (
                *(names.NODE_JSON, names.JOINER_JSON, names.SWITCH_JSON),
                names.TAKE_IN_JSON,
            )
            for name in (*written, *names.AGENT_LOGS, *names.JOINER_LOGS, names.PLUGIN_PROBLEM):
                path = node.state_dir / name
                path.unlink(missing_ok=True)
                path.with_suffix(".part").unlink(missing_ok=True)  # a process was killed
            node.state_dir.rmdir()  # unless something that is not ours is in it
    passes.remove_cgroup()
    selftests.sweep()


@contextlib.contextmanager
def _locked_if_possible(node: Node) -> Iterator[None]:
    """The node's lock; a state folder that cannot be written is no reason not to switch off."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(node.locked())
        except OSError as error:
            log.warning("no_lock", f"going on without the lock: {error}")
        yield


def install(node: Node, places: installer.Places, options: dict[str, Any] | None) -> None:
    """The plugin and its entry, in place and up to date."""
    wanted = installer.entry(node.bpffs, node.state_dir, options)
    try:
        done = installer.install(places, wanted)
    except DoesNotRun as error:
        with contextlib.suppress(OSError):  # that it does not run is graver
            node.note_plugin_problem(str(error))
        raise
    node.note_plugin_problem("")
    print(f"{places.files.link}: {'installed' if done.program_changed else 'was up to date'}")
    for problem in done.conf.problems:
        log.warning("conf_problem", problem)
    if done.conf.conflist is None:
        raise NodeError("no network configuration has our entry, so no pod is accelerated")
    print(f"{done.conf.conflist}: {'our entry is in' if done.conf.changed else 'was up to date'}")


def uninstall(node: Node, places: installer.Places, *, purge: bool) -> None:
    """Everything of ours off this node, in an order that lets every pod start and end."""
    done = installer.uninstall(places, functools.partial(unload, node), purge=purge)
    for problem in done.conf.problems:
        log.warning("conf_problem", problem)
    for pid in done.still_running:
        log.warning("plugin_running", f"process {pid} still runs the plugin that is now removed")
    if done.conf.changed:
        print(f"{done.conf.conflist}: our entry is out")
    for left in done.conf.left:
        print(left)
    if done.program_removed:
        print(f"{places.files.link}: removed")
    if done.left_stub:
        print(
            f"{places.files.link}: a stub, with which pods can end that the plugin has seen; "
            "when they are gone, `uninstall --purge` removes it"
        )


def join(node: Node, *, parent: int | None = None) -> None:
    """Runs passes as they become due, until it is told to end; or its parent ends, however.

    `parent`: the pid of the process that has started this one; it may have ended since.
    """
    from install.program.joiner import Joiner  # noqa: PLC0415 - for this command alone
    from install.program.passes import Runner  # noqa: PLC0415

    stopped, stop = os.pipe()
    told: list[int] = []

    def end(number: int, _frame: object) -> None:
        told.append(number)
        os.write(stop, b"\0")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    if parent is not None:
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        if os.getppid() != parent:
            return  # it has ended before it could be watched
    runner = Runner(functools.partial(leaving.stand_in, node.bpffs))
    Joiner(node.bpffs, node.state_dir, runner).run(lambda: bool(told), stopped)


def pause(node: Node, pod: str | None = None) -> None:
    """From the next message on, every byte goes by TCP; with `pod`, those to and from that pod.

    `pod` is NAMESPACE/NAME. A pod that comes in its place is not paused. Warns of pods that still
    bypass a moment later: a direction goes to TCP when its reader has read what was bypassed.
    """
    pods: set[int] | None = None
    with _locked_if_possible(node):
        if pod is not None:
            pods = _ids_of(node, pod)
            pauses.apply(node, lambda own: replace(own, pods=own.pods | pods))
        elif not pauses.apply(node, lambda own: replace(own, node=True, is_trial=False)):
            raise NodeError(f"nothing is loaded below {node.bpffs}; there is nothing to pause")
    _name_those_that_bypass(node, pods)


def _name_those_that_bypass(node: Node, pods: set[int] | None) -> None:
    try:
        still = _still_bypassing(node, pods)
    except OSError as error:
        log.warning("pods_unknown", f"which pods still bypass cannot be read: {error}")
        return
    for record in still:
        log.warning(
            "still_bypassing",
            f"{record.pod_namespace}/{record.pod_name} still bypasses: its messages go by TCP as "
            "soon as their reader has read all that was bypassed",
            **log.of(record),
        )


def _still_bypassing(node: Node, pods: set[int] | None) -> list[Attachment]:
    """Those of these pods, None: of all, that bypass again and again after a pause.

    Once is not enough: a connection that closes may count then what it has bypassed before.
    """
    records = {each.pod_id: each for each in node.attachments()}
    busy = set(records) if pods is None else set(records) & pods
    generations = node.generations.complete()
    growth = report.Growth(report.counters(generations, busy))
    for _ in range(LOOKS):
        if busy:
            time.sleep(LOOK_S)
            grown = growth.to(report.counters(generations, busy))
            busy = {
                pod_id
                for pod_id in busy
                if any(hop.bypassed_bytes for hop in grown.get(pod_id, {}).values())
            }
    return [records[each] for each in sorted(busy)]


def resume(node: Node, pod: str | None = None) -> None:
    """Undoes pause: everything, or what concerns one pod, may bypass again.

    Each direction goes back to the bypass when its order rule allows. What the cluster's switch
    has paused stays so.
    """
    with _locked_if_possible(node):
        if pod is not None:
            pods = _ids_of(node, pod)
            pauses.apply(node, lambda own: replace(own, pods=own.pods - pods))
        elif not pauses.apply(node, lambda _: pauses.Pauses()):
            raise NodeError(f"nothing is loaded below {node.bpffs}; run tcpip-bypass-node load")
        held = switches.kept(node.state) or switches.Kept()
    if held.holds_node or held.held_pods:
        log.warning(
            "switch_holds",
            f"{'this node' if held.holds_node else 'some pods'} stay paused: the ConfigMap "
            "that is the cluster's switch says so; resume there",
        )


def _ids_of(node: Node, pod: str) -> set[int]:
    """One for each of its sandboxes that is accelerated; raises NodeError when there is none."""
    found = {
        record.pod_id
        for record in node.attachments()
        if f"{record.pod_namespace}/{record.pod_name}" == pod
    }
    if not found:
        raise NodeError(
            f"no pod {pod} is accelerated on this node; tcpip-bypass-node status lists all that are"
        )
    return found


def status(node: Node, *, as_json: bool, watch_s: float | None = None) -> int:
    """Prints the node's state: a table for people, maybe live, or one JSON document.

    Returns the exit status, of install/program/exits.py.
    """
    found = report.facts(node)
    if as_json:
        print(json.dumps(report.as_json(found), indent=1))
        return found.exit_status
    from install.program import status as tables  # noqa: PLC0415 - rich: 5 MB that the agent can do without

    console = _console()
    if watch_s is None:
        tables.show(found, console)
    elif console.is_terminal:
        with contextlib.suppress(KeyboardInterrupt):
            tables.watch(node, console, watch_s)
        return exits.WELL
    else:
        raise NodeError("--watch needs a terminal; for machines there is --json")
    return found.exit_status


def _console() -> Console:
    from rich.console import Console  # noqa: PLC0415 - see status()

    return Console(width=None if os.isatty(1) else 140)
