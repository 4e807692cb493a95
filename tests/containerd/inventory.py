# SPDX-License-Identifier: Apache-2.0
"""What pods can leave behind on a node, listed by kind."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import pyroute2

from bpf import bpfsys, pins
from cni_plugin import names
from tests.containerd.cri import Cri
from tests.containerd.node import Node, folders_in

Inventory = dict[str, list[str]]
NAMESPACES = Path("/run/netns")
SEEN_RESULTS = Path("/var/lib/cni/results")  # as the node's mounts have it
CNI_RESULTS = "var/new/cni/results"  # the same in the node's folder


def of(node: Node, cri: Cri) -> Inventory:
    """Everything that is on a node now."""
    state_dir = node.outside(Path(names.STATE_DIR))
    return {
        "sandboxes": cri.sandbox_ids(),
        "attached programs": _attached_below(node.cgroup),
        "attachment records": _names(state_dir.glob(f"{names.ATTACHMENTS}/*")),
        "failure notes": _names(state_dir.glob(f"{names.FAILURES}/*")),
        "pod counters": _counters(node),
        "veth interfaces": _veths(node),
        "network namespaces": _names(node.outside(NAMESPACES).glob("*")),
        "host-local leases": _leases(node.folder / "ipam"),
        "CNI results": _names(node.folder.glob(f"{CNI_RESULTS}/*")),
        "pod cgroups": _names(node.pods.glob("*/")),
        # Names alone: containerd is the same one when it has been started again.
        "processes": sorted(set(node.processes().values())),
        "mounts": _mounts(node),
    }


def difference(now: Inventory, before: Inventory) -> Inventory:
    """What is there now and was not before, by kind."""
    return {kind: sorted(set(found) - set(before[kind])) for kind, found in now.items()}


def attached(cgroup: Path) -> list[str]:
    """The names of the sock_ops programs attached to a cgroup itself."""
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with bpfsys.closing(fd):
        return [_program_name(program_id) for program_id in bpfsys.prog_query(fd)]


def _attached_below(cgroup: Path) -> list[str]:
    found = []
    for folder in folders_in(cgroup):
        with suppress(FileNotFoundError):  # gone since we saw it
            found += [f"{folder.name}: {program}" for program in attached(folder)]
    return found


def _program_name(program_id: int) -> str:
    with bpfsys.closing(bpfsys.prog_open(program_id)) as fd:
        return bpfsys.prog_info(fd).name


def _counters(node: Node) -> list[str]:
    """The generations of our programs that still count for some pod."""
    bpffs = node.inside(Path(names.BPFFS))
    found = []
    for pin in bpffs.glob(f"gen-*/{pins.COUNTERS}"):
        with bpfsys.closing(bpfsys.obj_get(str(pin))) as fd:
            if not bpfsys.map_is_empty(fd):
                found.append(pin.parent.name)
    return found


def _veths(node: Node) -> list[str]:
    with pyroute2.NetNS(node.host.name, flags=0) as route:
        return [str(link.get_attr("IFLA_IFNAME")) for link in route.get_links(kind="veth")]


def _mounts(node: Node) -> list[str]:
    mountinfo = Path(f"/proc/{node.holder}/mountinfo").read_text()
    return [line.split()[4] for line in mountinfo.splitlines()]


def _leases(folder: Path) -> list[str]:
    """Their files, below a folder for each network; named by address."""
    found = folder.glob("*/*")
    return sorted(
        str(path.relative_to(folder))
        for path in found
        if path.name != "lock" and not path.name.startswith("last_reserved_ip")
    )


def _names(paths: Iterable[Path]) -> list[str]:
    return sorted(path.name for path in paths)
