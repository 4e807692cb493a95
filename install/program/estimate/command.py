# SPDX-License-Identifier: Apache-2.0
"""The command `estimate`, from its options."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cni_plugin import names
from cni_plugin.netconf import NetConf
from install.program import VERSION, conf_dir, installer, log, report
from install.program.agent.command import sockets_of
from install.program.conf_dir import ConfDir
from install.program.estimate import pods as of_pods
from install.program.estimate.pods import Pod
from install.program.estimate.survey import Estimate, HopTraffic, Survey, Traffic
from install.program.in_force import in_force
from install.program.node import Node, NodeError

if TYPE_CHECKING:
    from install.program.installer import Places

MODES = ("full", "proxy-only")


def run(node: Node, places: Places, arguments: argparse.Namespace) -> int:
    """Prints the estimate; returns the exit status. Raises NodeError, OSError, InstallError."""
    conf = configuration(node, places, arguments.conf_json)
    found = Survey(pods_of(arguments, conf), places.host_proc).run(arguments.seconds)
    mode = known_mode(node, conf)
    if arguments.json:
        print(json.dumps(as_json(found, mode), indent=1))
    else:
        print("\n".join(lines(found, mode)))
    return 0


def configuration(node: Node, places: Places, options: str | None) -> NetConf:
    """What is given; else what is in force on the node; else the defaults."""
    entry: dict[str, Any] = {}
    given = installer.options_of(options)
    if given is not None:
        entry = installer.entry(node.bpffs, node.state_dir, given).over({})
    try:
        if given is None and (ours := ConfDir(places.conf_dir).ours()):
            return in_force(node.state, ours.entry, ours.path).conf
        return conf_dir.parsed(entry, places.conf_dir)
    except ValueError as error:
        raise NodeError(str(error)) from error


def pods_of(arguments: argparse.Namespace, conf: NetConf) -> list[Pod]:
    """By the runtime; where none answers, by the network namespaces of processes."""
    socket = next((each for each in sockets_of(arguments) if each.is_socket()), None)
    if socket is not None:
        from install.program.agent.cri import CriError  # noqa: PLC0415 - see there

        try:
            return of_pods.of_runtime(socket, conf)
        except CriError as error:
            log.warning("no_runtime", f"pods have no names: {error}")
    else:
        log.warning("no_runtime", "pods have no names: no container runtime; name --cri-socket")
    return of_pods.of_processes(arguments.host_proc, conf)


def known_mode(node: Node, conf: NetConf) -> str | None:
    """The mode that the configuration forces or an earlier `load` has found; None: neither."""
    if conf.mode != "auto":
        return conf.mode
    if (node.state_dir / names.NODE_JSON).exists():
        return node.state.node_mode()[0]
    return None


def as_json(found: Estimate, mode: str | None) -> dict[str, Any]:
    """What `estimate --json` prints; rates are left to the reader."""
    return {
        "version": VERSION,
        "kernel": platform.release(),
        "node": report.node_name(),
        "seconds": found.seconds,
        "mode": mode,
        "pods": [
            {
                "namespace": pod.namespace,
                "name": pod.name,
                "accelerated": pod.plan is not None,
                "reason": pod.reason,
                "hops": _hops(found.hops.get(pod, {})),
            }
            for pod in found.pods
        ],
        "total": _hops(found.total),
        "sidecar_calls": {
            "messages": found.calls,
            "on_node": found.calls_on_node,
            "share": found.share_on_node,
        },
        "saved": {
            each: {"cpus": found.saved_cpu(each), "call_us": found.saved_latency_us(each)}
            for each in MODES
        },
        "sockets_without_process": found.unseen_files,
    }


def _hops(hops: dict[str, HopTraffic]) -> dict[str, Any]:
    return {
        hop: {
            "bypass": _traffic(traffic.bypass),
            "tcp": {reason: _traffic(each) for reason, each in traffic.tcp.items()},
        }
        for hop, traffic in hops.items()
    }


def _traffic(traffic: Traffic) -> dict[str, float]:
    return {
        "connection_ends": traffic.connections,
        "messages": traffic.messages,
        "bytes": traffic.bytes,
    }


def lines(found: Estimate, mode: str | None) -> Iterator[str]:
    """The estimate for a person, or for the log of a Job."""
    planned = sum(pod.plan is not None for pod in found.pods)
    yield (
        f"{report.node_name()}, Linux {platform.release()}: {len(found.pods)} pods, "
        f"{planned} would be accelerated; looked at for {found.seconds:.0f} s"
    )
    yield ""
    yield _row("pod", "hop", "ends", "messages/s", "bytes/s", "would bypass", "stays on TCP")
    for pod, hops in sorted(found.hops.items(), key=lambda item: item[0].title):
        yield from _rows(pod.title, hops, found.seconds)
    yield from _rows("all pods", found.total, found.seconds)
    yield ""
    yield from _gain(found, mode)
    if found.unseen_files:
        yield (
            f"Of {found.unseen_files} sockets the process is not to be seen, and so not whether it "
            "reads with blocking calls."
        )


def _gain(found: Estimate, mode: str | None) -> Iterator[str]:
    if found.share_on_node is None:
        yield "No sidecar called another one."
    else:
        share = f"at least {found.share_on_node:.1%}"
        yield f"Calls from sidecar to sidecar that stay on this node: {share}"
    for each in MODES:
        latency = found.saved_latency_us(each)
        call = "" if latency is None else f"{latency:.1f} us less for each call, "
        here = " (this node's mode)" if each == mode else ""
        yield f"In mode {each}{here}: {call}{found.saved_cpu(each):.3f} CPUs less"
    if mode is None:
        yield "Which mode this kernel allows: tcpip-bypass-node selftest, or check --before-install"
    elif mode == "off":
        yield "This node's mode is off: nothing would bypass."


def _rows(title: str, hops: dict[str, HopTraffic], seconds: float) -> Iterator[str]:
    for hop, traffic in sorted(hops.items()):
        total = traffic.all
        reasons = sorted(traffic.tcp.items(), key=lambda item: -item[1].bytes)
        share = traffic.bypass.bytes / total.bytes if total.bytes else 0.0
        yield _row(
            title,
            hop,
            f"{total.connections:,}",
            f"{total.messages / seconds:,.0f}",
            f"{total.bytes / seconds:,.0f}",
            f"{share:.1%}" if total.bytes else "-",
            ", ".join(f"{each.connections} {reason}" for reason, each in reasons),
        )
        title = ""


def _row(*cells: str) -> str:
    widths = (40, 9, 7, 12, 15, 13)
    *first, last = cells
    text = "".join(
        f"{cell:{'<' if number < 2 else '>'}{width}} "
        for number, (cell, width) in enumerate(zip(first, widths))
    )
    return f"{text} {last}".rstrip()
