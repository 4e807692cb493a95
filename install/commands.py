"""The commands of tcpip-bypass-node, without their command line."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bpf import abi, stats
from bpf.loader import LoadError, Programs
from cni_plugin import attachment, bpfsys, names
from cni_plugin.state import Attachment, State
from install import selftest as selftests
from install.generations import Generation, Generations, is_bpffs, opened
from install.pods import attached_cgroups

LOCK_PATIENCE_S = 30.0


class NodeError(Exception):
    """The command could not do its work; the message says what to do about it."""


@dataclass(frozen=True)
class Node:
    """One node, by its two folders."""

    bpffs: Path
    state_dir: Path

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

    def attachments(self) -> list[Attachment]:
        """Every attachment with a readable record."""
        state = self.state
        records = [state.read(key) for key in state.keys()]  # noqa: SIM118 - not a dict
        return [record for record in records if record is not None]


def selftest(_node: Node, *, as_json: bool) -> None:
    """Tries this kernel and prints what was found; changes nothing on the node."""
    verdict = selftests.run()
    if as_json:
        print(json.dumps(verdict.as_json(), indent=1))
        return
    table = Table("", "what", "expected", "found")
    for check in verdict.checks:
        table.add_row("ok" if check.ok else "WRONG", check.what, check.expected, check.found)
    console = _console()
    console.print(table)
    console.print(f"Mode on kernel {platform.release()}: {verdict.mode}")
    for reason in verdict.reasons:
        console.print(f"  because of {reason}")


def load(node: Node) -> None:
    """Tries the kernel, then makes a new generation current; attached pods move over to it."""
    if not is_bpffs(node.bpffs):
        raise NodeError(f"{node.bpffs} is not on a bpffs; mount one: mount -t bpf bpf /sys/fs/bpf")
    verdict = selftests.run()
    for reason in verdict.reasons:
        print(f"warning: mode {verdict.mode} because of {reason}", file=sys.stderr)
    try:
        programs = Programs()
    except LoadError:
        with node.locked():
            _write_node_json(node, verdict)
        raise
    with node.locked():
        _write_node_json(node, verdict)
        generations = node.generations
        ours = generations.program_ids()
        generation = generations.publish(programs)
        try:
            _move_pods(node, generation, ours, verdict.mode)
        finally:
            generations.remove_idle(_attached_ids(generations))


def _move_pods(node: Node, generation: Generation, ours: set[int], mode: str) -> None:
    """New connections of attached pods are handled by this generation from now on.

    The self-test's mode holds for them as for new pods, unless their configuration forces one.
    """
    pins = attachment.Generation(generation.folder)
    states = {record.pod_id: record for record in node.attachments()}
    if mode == "off":
        for older in node.generations.complete():
            if older != generation:
                older.set_paused(True)
    for pod in attached_cgroups(ours):
        record = pod.record
        forced = record is not None and record.flags & abi.POD_FORCED
        if record is None or (mode == "off" and not forced):
            pod.take_out()
            continue
        if mode == "proxy-only" and not forced:
            record.flags |= abi.POD_PROXY_ONLY
        if record.id in states:
            moved = states[record.id]._replace(
                prog_id=generation.sock_ops_id(), generation=pins.name, flags=record.flags
            )
            node.state.write(moved)
        try:
            attachment.move(pod.fd, pod.inode, pod.programs, pins, record)
        except OSError as error:
            print(f"warning: {pod.path} stays on its generation: {error}", file=sys.stderr)


def _attached_ids(generations: Generations) -> set[int]:
    """The programs of these generations that some pod has."""
    pods = attached_cgroups(generations.program_ids())
    return {each.program.id for pod in pods for each in pod.programs}


def _write_node_json(node: Node, verdict: selftests.Verdict) -> None:
    path = node.state_dir / names.NODE_JSON
    staged = path.with_suffix(".part")
    content = {**verdict.as_json(), "kernel": platform.release()}
    try:
        staged.write_text(json.dumps(content, indent=1))
        staged.rename(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise


def unload(node: Node) -> None:
    """Everything of ours off this node. Open connections go on over TCP."""
    with _locked_if_possible(node):
        generations = node.generations
        ours = generations.program_ids()
        generations.withdraw()
        _set_paused(node, True)
        for pod in attached_cgroups(ours):
            pod.take_out()
        generations.remove_all()
        for folder in (names.ATTACHMENTS, names.VALIDATED):
            shutil.rmtree(node.state_dir / folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            (node.state_dir / names.NODE_JSON).unlink(missing_ok=True)
            node.state_dir.rmdir()  # unless something that is not ours is in it
    selftests.sweep()


@contextlib.contextmanager
def _locked_if_possible(node: Node) -> Iterator[None]:
    """The node's lock; a state folder that cannot be written is no reason not to switch off."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(node.locked())
        except OSError as error:
            print(f"warning: going on without the lock: {error}", file=sys.stderr)
        yield


def pause(node: Node) -> None:
    """From the next message on, every byte goes by TCP."""
    with _locked_if_possible(node):
        if not _set_paused(node, True):
            raise NodeError(f"nothing is loaded below {node.bpffs}; there is nothing to pause")


def resume(node: Node) -> None:
    """Undoes pause; each direction goes back to the bypass when its order rule allows."""
    with _locked_if_possible(node):
        if not _set_paused(node, False):
            raise NodeError(f"nothing is loaded below {node.bpffs}; run tcpip-bypass-node load")


def _set_paused(node: Node, paused: bool) -> int:
    """Returns how many generations there are."""
    generations = node.generations.complete()
    for generation in generations:
        generation.set_paused(paused)
    return len(generations)


def status(node: Node, *, as_json: bool) -> None:
    """Prints the node's state: a table for people, or one JSON document."""
    report = status_report(node)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _print_status(report)


def status_report(node: Node) -> dict[str, Any]:
    """What `status --json` prints."""
    current = node.generations.current()
    mode, reason = node.state.node_mode()
    complete = node.generations.complete()
    return {
        "loaded": current is not None,
        "generation": current.number if current else None,
        "older_generations": [g.number for g in complete if g != current],
        "paused": bool(complete) and all(g.flags() & abi.CONTROL_PAUSED for g in complete),
        "mode": mode,
        "reason": reason,
        "pods": [_pod_report(record, complete) for record in node.attachments()],
    }


def _pod_report(record: Attachment, generations: list[Generation]) -> dict[str, Any]:
    hops: dict[str, stats.HopCounters] = {}
    for generation in generations:
        with opened(generation.folder / names.COUNTERS) as fd:
            lookup = functools.partial(bpfsys.map_lookup, fd)
            found = stats.pod_counters(record.pod_id, lookup)
        for hop, counters in found.items():
            hops[hop] = hops.get(hop, stats.HopCounters()) + counters
    return {
        "pod_id": record.pod_id,
        "namespace": record.pod_namespace,
        "name": record.pod_name,
        "container_id": record.container_id,
        "ips": sorted({address for address, _ in record.ips}),
        "generation": record.generation,
        "hops": {hop: asdict(counters) for hop, counters in hops.items()},
    }


def _print_status(report: dict[str, Any]) -> None:
    console = _console()
    if not report["loaded"] and (report["older_generations"] or report["pods"]):
        console.print("Half unloaded: run tcpip-bypass-node unload again, or load.")
    elif not report["loaded"]:
        console.print("Not loaded: pods on this node use plain TCP. Run tcpip-bypass-node load.")
        return
    console.print(
        f"Generation {report['generation']}, mode {report['mode']} ({report['reason']})"
        + (", paused: all bytes go by TCP" if report["paused"] else "")
    )
    if report["older_generations"]:
        console.print(f"Older generations with connections: {report['older_generations']}")
    table = Table("pod", "hop", "connections", "bypassed", "by TCP", "why by TCP (messages)")
    for pod in report["pods"]:
        name = f"{pod['namespace']}/{pod['name']}"
        for hop, counters in pod["hops"].items():
            table.add_row(
                name,
                hop,
                _counts(counters["connections"]),
                f"{counters['bypassed_messages']} messages, {counters['bypassed_bytes']} B",
                f"{counters['tcp_bytes']} B",
                _counts(counters["tcp_messages"]),
            )
        if not pod["hops"]:
            table.add_row(name, "no connection yet")
    console.print(table)


def _console() -> Console:
    return Console(width=None if os.isatty(1) else 140)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
