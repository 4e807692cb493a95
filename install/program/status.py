# SPDX-License-Identifier: Apache-2.0
"""`status` for a person: a table per pod and hop, once with totals, or live with rates."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bpf import abi
from bpf.stats import HopCounters
from cni_plugin.state import Attachment
from install.program import report, switch
from install.program.report import Facts, Failure, Growth, Hops

if TYPE_CHECKING:
    from install.program.node import Node

PAIRED = abi.PAIRED[0]
NAMES_FIT = 120  # columns of a terminal in which a pod's name need not be folded
SHORT_ID = 13  # characters of a container ID, as crictl prints and takes them


def show(found: Facts, console: Console) -> None:
    """Prints the node's state and what its pods have counted since their ADD."""
    console.print(_page(found, report.by_pod(_read(found)), console.width))


def watch(node: Node, console: Console, seconds: float) -> None:
    """Shows the node's state and what is counted per second, until KeyboardInterrupt."""
    growth, before = Growth(_read(report.facts(node))), time.monotonic()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            found = report.facts(node)
            reading, now = _read(found), time.monotonic()
            page = _page(found, growth.to(reading), console.width, now - before)
            live.update(page, refresh=True)
            before = now


def _read(found: Facts) -> report.Reading:
    """What the pods have counted, without hops where that is nothing."""
    reading = report.counters(found.generations, [each.pod_id for each in found.attachments])
    return {
        key: {hop: counted for hop, counted in hops.items() if counted != HopCounters()}
        for key, hops in reading.items()
    }


def _page(
    found: Facts, pods: dict[int, Hops], width: int, passed_s: float | None = None
) -> RenderableType:
    """Everything; `pods` holds totals, or what was counted in `passed_s` seconds."""
    parts = list(_head(found))
    if found.attachments:
        parts.append(_table(found, pods, width, passed_s))
        parts.extend(_advice(found, pods))
    if found.failures:
        parts.append(_failures(found.failures))
    return Group(*parts)


def _head(found: Facts) -> Iterator[RenderableType]:
    older = [g.number for g in found.generations if g != found.current]
    if found.current:
        attached = sum(record.pod_id in found.attached for record in found.attachments)
        yield Text.assemble(
            (f"{attached} pod{'' if attached == 1 else 's'} accelerated", "bold"),
            f" by generation {found.current.number}, mode {_mode(found)}",
        )
    elif older or found.attachments:
        yield Text("Half unloaded: run tcpip-bypass-node unload again, or load.", "red")
    else:
        yield "Not loaded: pods on this node use plain TCP. Run tcpip-bypass-node load."
    if found.lost_answers is not None:
        lost = f"; {found.lost_answers} answers could not be written" if found.lost_answers else ""
        yield f"FIONREAD, which this kernel gets wrong, is mended{lost}."
    if found.joining_problem:
        yield Text(f"All bytes go by TCP: {found.joining_problem}.", "red")
    if found.plugin_problem:
        yield Text(f"No new pod is accelerated: {found.plugin_problem}", "red")
    if report.SWITCH in found.paused_by:
        undo = f"edit the ConfigMap {switch.CONFIGMAP}"
        yield Text(f"Paused for the whole cluster, by its switch: {undo}.", "yellow")
    if report.OPERATOR in found.paused_by:
        yield Text("Paused: all bytes go by TCP until tcpip-bypass-node resume.", "yellow")
    if older:
        yield f"Older generations that are still in use: {', '.join(map(str, older))}"


def _mode(found: Facts) -> str:
    if found.named_mode is None:
        return found.mode if found.mode == "full" else f"{found.mode}: {found.reason}"
    mode, by = found.named_mode  # what the self-test has against it is said by `check`
    return f"{mode}, which {by} forces; the self-test allows {found.mode}"


def _table(found: Facts, pods: dict[int, Hops], width: int, passed_s: float | None) -> Table:
    """The rows of a pod stand together; its name and addresses run down beside its hops."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    per = "" if passed_s is None else "/s"
    table.add_column("pod", overflow="fold", no_wrap=width >= NAMES_FIT)
    table.add_column("hop", no_wrap=True)
    for heading in ("paired", "messages", "bypassed", "by TCP"):
        table.add_column(heading + per, justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    table.add_column(f"left on TCP{per}")

    def add(labels: list[Text], hops: Hops) -> None:
        rows = [_row(hop, hops[hop], passed_s or 1.0) for hop in abi.HOPS if hop in hops]
        quiet = [["-"] * 6 + ["nothing yet"]]
        for label, row in itertools.zip_longest(labels, rows or quiet):
            table.add_row(label, *(row or []))
        table.add_section()

    total: Hops = {}
    for record in sorted(found.attachments, key=lambda each: (each.pod_namespace, each.pod_name)):
        hops = pods.get(record.pod_id, {})
        add(_labels(record, found), hops)
        report.add(total, hops)
    if len(found.attachments) > 1:
        add([Text("all pods", "bold")], total)
    return table


def _advice(found: Facts, pods: dict[int, Hops]) -> Iterator[Text]:
    """A line for all pods that the same is to be done about."""
    concerned: dict[str, list[str]] = {}
    for record in found.attachments:
        if text := report.advice(record, pods.get(record.pod_id, {})):
            pod = f"{record.pod_namespace}/{record.pod_name}"
            concerned.setdefault(text, []).append(pod)
    for text, names in sorted(concerned.items()):
        yield Text(f"{report.MISMATCH}: {', '.join(sorted(names))}: {text}.", "yellow")


def _labels(record: Attachment, found: Facts) -> list[Text]:
    labels = [Text(f"{record.pod_namespace}/{record.pod_name}", "bold")]
    if record.pod_id not in found.attached:
        is_gone = record.pod_id in found.gone
        labels.append(Text("its cgroup is gone" if is_gone else "lost its programs", "red"))
    if by := found.pod_paused_by(record):
        is_switch = by == (report.SWITCH,)
        labels.append(Text("paused by the switch" if is_switch else "paused", "yellow"))
    if record.flags & abi.POD_PROXY_ONLY:
        labels.append(Text("proxy-only", "yellow"))
    return labels + [Text(address, "dim") for address, _ in record.ips]


def _row(hop: str, counted: HopCounters, seconds: float) -> list[str]:
    sent = counted.bypassed_bytes + counted.tcp_bytes
    return [
        hop,
        _number(counted.connections.get(PAIRED, 0) / seconds),
        _number(counted.bypassed_messages / seconds),
        _size(counted.bypassed_bytes / seconds),
        _size(counted.tcp_bytes / seconds),
        f"{counted.bypassed_bytes * 1000 // sent / 10}%" if sent else "-",  # rounded down
        _left_on_tcp(counted, seconds),
    ]


def _left_on_tcp(counted: HopCounters, seconds: float) -> str:
    """What did not bypass, and why, the most frequent first."""
    connections = {why: count for why, count in counted.connections.items() if why != PAIRED}
    kinds = (("connections", connections), ("messages", counted.tcp_messages))
    texts = []
    for kind, counts in kinds:
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        if some := [f"{_number(count / seconds)} {why}" for why, count in ordered if count]:
            texts.append(f"{kind}: {', '.join(some)}")
    return "; ".join(texts)


def _number(value: float) -> str:
    """A count or a rate; what is rare per second is not rounded to nothing."""
    if value == 0:
        return "-"
    return f"{value:,.0f}" if value == int(value) or value >= 10 else f"{value:.1f}"


def _size(value: float) -> str:
    if value < 1000:
        return f"{_number(value)} B" if value else "-"
    return decimal(round(value))


def _failures(failures: list[Failure]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("not accelerated", overflow="fold")
    table.add_column("container", no_wrap=True)
    table.add_column("since (UTC)", no_wrap=True)
    table.add_column("because of")
    for failure in failures:
        pod = Text(f"{failure.namespace}/{failure.name}", "bold")
        since = datetime.fromtimestamp(failure.time, UTC).strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(pod, failure.container_id[:SHORT_ID], since, Text(failure.reason))
    return table
