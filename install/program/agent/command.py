# SPDX-License-Identifier: Apache-2.0
"""The node program's commands `agent` and `gc`, from their options."""

from __future__ import annotations

import argparse
import functools
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

from cni_plugin import names
from install.program import installer, log
from install.program.installer import Places
from install.program.node import Node, NodeError

# containerd, CRI-O, k3s, k0s, MicroK8s.
CRI_SOCKETS = (
    Path("/run/containerd/containerd.sock"),
    Path("/run/crio/crio.sock"),
    Path("/run/k3s/containerd/containerd.sock"),
    Path("/run/k0s/containerd.sock"),
    Path("/var/snap/microk8s/common/run/containerd.sock"),
)


def gc(node: Node, places: Places, arguments: argparse.Namespace) -> int:
    """Returns the exit status."""
    from install.program.agent import cri, repair  # noqa: PLC0415 - see cri.py

    sockets = sockets_of(arguments)
    socket = next((each for each in sockets if each.is_socket()), None)
    if socket is None:
        raise NodeError(
            f"no container runtime: none of {_listed(sockets)} is there; name --cri-socket"
        )
    try:
        done = repair.run(node, places, socket, attach=arguments.adopt)
    except cri.CriError as error:
        raise NodeError(f"nothing was changed: {error}") from error
    if arguments.json:
        print(json.dumps(asdict(done)))
        return 0
    print(f"attachments: {done.removed} removed, {done.attached} made, {done.failed} failed")
    return int(done.failed > 0)


def agent(node: Node, places: Places, arguments: argparse.Namespace) -> int:
    """Returns the exit status, when the agent has been told to end."""
    from install.program.agent import http, kubernetes  # noqa: PLC0415 - for this command alone
    from install.program.agent.agent import Agent, Settings  # noqa: PLC0415
    from install.program.agent.metrics import Metrics  # noqa: PLC0415

    options = installer.options_of(arguments.conf_json)
    if options is not None:  # these replace what is configured
        node = replace(node, fionread=options.get("fionread", names.FIONREAD_CHOICES[0]))
    log.keep(node.state_dir, names.AGENT_LOGS)
    try:
        daemonset = arguments.daemonset and kubernetes.DaemonSet.parse(arguments.daemonset)
        settings = Settings(
            places=places,
            entry=installer.entry(node.bpffs, node.state_dir, options),
            load_options=[*_common(arguments), *_fionread_options(node, arguments)],
            gc_options=[*_common(arguments), *_places_options(arguments)],
            join_options=[
                *_common(arguments),
                *("--parent", str(os.getpid())),
                *("--log-format", arguments.log_format, "--log-level", arguments.log_level),
            ],
            cri_sockets=sockets_of(arguments),
            question=kubernetes.Question(daemonset) if daemonset else None,
            switch_dir=arguments.switch_dir,
            once=arguments.once,
        )
        metrics, health = Metrics(node, per_pod=arguments.per_pod_metrics), http.Health()
        serve = functools.partial(http.serve, arguments.listen, metrics, health)
        return Agent(node, settings, metrics, health).run(serve if arguments.listen else None)
    except ValueError as error:
        raise NodeError(str(error)) from error


def sockets_of(arguments: argparse.Namespace) -> tuple[Path, ...]:
    """Where the runtime may listen: what --cri-socket says, or the well-known places."""
    given = arguments.cri_socket
    return (Path(given.removeprefix("unix://")),) if given else CRI_SOCKETS


def _listed(sockets: tuple[Path, ...]) -> str:
    return ", ".join(map(str, sockets))


def _common(arguments: argparse.Namespace) -> list[str]:
    """What every child of the agent is told as well."""
    return [
        *("--bpffs", str(arguments.bpffs)),
        *("--state-dir", str(arguments.state_dir)),
    ]


def _fionread_options(node: Node, arguments: argparse.Namespace) -> list[str]:
    chosen = [] if node.fionread is None else ["--fionread", node.fionread]
    return ["--cni-conf-dir", str(arguments.cni_conf_dir), *chosen]


def _places_options(arguments: argparse.Namespace) -> list[str]:
    """And those that have to do with pods."""
    return [
        *("--cni-conf-dir", str(arguments.cni_conf_dir)),
        *("--cni-bin-dir", str(arguments.cni_bin_dir)),
        *("--plugin-dir", str(arguments.plugin_dir)),
    ]
