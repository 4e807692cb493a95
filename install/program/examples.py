# SPDX-License-Identifier: Apache-2.0
"""What `--help` shows behind the options: command lines as an operator would type them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

PROGRAM = "tcpip-bypass-node"

# By command: what it is for, and the arguments.
EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "load": [
        ("after a boot, or after an upgrade", "load"),
        ("beside another installation", "load --bpffs /sys/fs/bpf/try --state-dir /run/try"),
    ],
    "unload": [("off this kernel; the plugin stays and passes pods through", "unload")],
    "status": [
        ("is this node accelerated, and which pods", "status"),
        ("the same, each second", "status --watch 1"),
        ("for a script", "status --json"),
    ],
    "check": [
        ("is this node well, and what is to be done", "check"),
        ("is it fit, before anything is installed", "check --before-install"),
    ],
    "bugreport": [("what a maintainer asks for, in one archive", "bugreport")],
    "estimate": [
        ("what would bypass here; nothing is loaded", "estimate --seconds 60"),
        ("with keys of our entry", """estimate --conf-json '{"scope": "all"}'"""),
    ],
    "compare": [("what the bypass brings, under your own load", "compare --seconds 120")],
    "selftest": [("before the first load on a new kernel", "selftest")],
    "install": [
        ("a node with containerd or CRI-O", "install"),
        ("one namespace stays on TCP", """install --conf-json '{"excludeNamespaces": ["db"]}'"""),
        (
            "K3s",
            "install --cni-conf-dir /var/lib/rancher/k3s/agent/etc/cni/net.d "
            "--cni-bin-dir /var/lib/rancher/k3s/data/cni",
        ),
    ],
    "uninstall": [
        ("running pods go on over TCP", "uninstall"),
        ("where no pod is left that the plugin has seen", "uninstall --purge"),
    ],
    "gc": [
        ("pods of which the runtime has reported no end", "gc"),
        ("and take in the pods that started before us", "gc --adopt"),
    ],
    "join": [("on a node without an agent, as long as connections are to join", "join")],
    "agent": [
        ("as the DaemonSet starts it", "agent --listen 0.0.0.0:15099"),
        ("bring this node up to date, and end", "agent --once"),
    ],
    "pause": [
        ("see every byte in tcpdump", "pause"),
        ("one pod's only", "pause --pod shop/cart-x2xlp"),
    ],
    "resume": [("after each pause, also of single pods", "resume")],
}


def add_to(
    parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]
) -> None:
    """Let each command's help end with its examples, and the program's with one of each."""
    _end_with(parser, [EXAMPLES[name][0] for name in commands if name in EXAMPLES])
    for name, command in commands.items():
        _end_with(command, EXAMPLES.get(name, []))


def _end_with(parser: argparse.ArgumentParser, examples: list[tuple[str, str]]) -> None:
    lines = [f"  {PROGRAM} {arguments}\n      {purpose}" for purpose, arguments in examples]
    if lines:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = "\n".join(["examples:", *lines])
