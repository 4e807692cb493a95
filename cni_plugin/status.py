"""STATUS: can this node accelerate a pod that is ADDed now?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cni_plugin import attachment, bpfsys, cgroup, names, netconf, schema
from cni_plugin.protocol import NotAvailable
from cni_plugin.state import State

if TYPE_CHECKING:
    from cni_plugin.protocol import Request


def status(request: Request) -> None:
    """Raises NotAvailable with every reason, or InvalidConfig.

    A configuration that turns the bypass off is no failure: ADD does what it asks for.
    """
    netconf.refuse_unsupported(request.conf)
    schema.validate(request.conf, Path(netconf.folders(request.conf)[1]))
    conf = netconf.parse(request.conf)
    if conf.mode == "off":
        return
    problems = _problems(conf.bpffs)
    if conf.mode == "auto":
        mode, reason = State(conf.state_dir).node_mode()
        if mode == "off":
            problems.append(f"this node's mode is off: {reason}")
    if problems:
        raise NotAvailable("this node cannot accelerate pods", "; ".join(problems))


def _problems(bpffs: str) -> list[str]:
    problems = []
    try:
        if cgroup.mount() is None:
            problems.append("no cgroup2 file system is mounted")
    except OSError as error:
        problems.append(str(error))
    try:
        generation = attachment.current_generation(bpffs)
        for pin in (names.SOCK_OPS, names.PODS, names.COUNTERS):
            with bpfsys.closing(generation.open(pin)):
                pass
    except attachment.NotLoaded as error:
        problems.append(str(error))
    return problems
