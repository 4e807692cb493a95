# SPDX-License-Identifier: Apache-2.0
"""STATUS: can a pod be ADDed now? Always: one that cannot be accelerated is passed through.

A runtime whose plugin fails here calls its node NotReady: no pod starts on it any more, and the
cluster evicts those that run. So what is missing is said on stderr, and is no failure.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bpf import bpfsys, pins
from cni_plugin import attachment, cgroup, log, netconf, schema
from cni_plugin.protocol import CniError
from cni_plugin.state import State

if TYPE_CHECKING:
    from cni_plugin.netconf import NetConf
    from cni_plugin.protocol import Request


def status(request: Request) -> None:
    """Say why a pod that is ADDed now would not be accelerated, though the operator wants it."""
    try:
        netconf.refuse_unsupported(request.conf)
        schema.validate(request.conf, Path(netconf.folders(request.conf)[1]))
        conf = netconf.parse(request.conf)
        conf = netconf.under_switch(conf, State(conf.state_dir).switch())
        missing = [] if conf.mode == "off" else _missing(conf)
    except (CniError, OSError, ValueError) as error:
        missing = [str(error)]
    if missing:
        log.say(f"warning: pods are not accelerated: {'; '.join(missing)}")


def _missing(conf: NetConf) -> list[str]:
    found = []
    try:
        if cgroup.find_mount() is None:
            found.append("no cgroup2 file system is mounted")
    except OSError as error:
        found.append(str(error))
    try:
        generation = attachment.current_generation(conf.bpffs)
        for pin in (pins.SOCK_OPS, pins.PODS, pins.COUNTERS):
            with bpfsys.closing(generation.open(pin)):
                pass
    except attachment.NotLoaded as error:
        found.append(str(error))
    if conf.mode == "auto":
        mode, reason = State(conf.state_dir).node_mode()
        if mode == "off":
            found.append(f"this node's mode is off: {reason}")
    return found
