# SPDX-License-Identifier: Apache-2.0
"""CHECK: is the pod accelerated the way its ADD left it?

CRI-O calls it right after each ADD, and gives the pod up when it fails (ocicni's checkNetwork). So
what ADD lets pass, CHECK does, too: no configuration is validated, and a record that cannot be read
is no difference.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cni_plugin import attachment, log, netns, results
from cni_plugin.netconf import folders
from cni_plugin.protocol import CheckFailed, UnknownContainer
from cni_plugin.state import Key, State

if TYPE_CHECKING:
    from cni_plugin.protocol import Request
    from cni_plugin.state import Attachment

_LOCK_PATIENCE_S = 2.0


def check(request: Request) -> None:
    """Raises CheckFailed that lists every difference.

    A pod without a record was passed through by ADD, for the reason that ADD gave then. There is
    no attachment of it to check.
    """
    previous = results.convert(results.previous(request), request.version)
    state = State(folders(request.conf)[1])
    key = Key(request.call.container_id, request.call.ifname)
    try:
        with state.locked(_LOCK_PATIENCE_S):  # a `load` changes record and kernel
            record = None if state.has_failed(key) else state.read(key)
            differences = [] if record is None else _missing_in_kernel(record)
    except OSError as error:
        log.say(f"warning: not checked: what ADD recorded cannot be read: {error}")
        return
    if record is None:
        if not Path(request.call.netns).exists():
            raise UnknownContainer(
                f"unknown container {request.call.container_id}",
                f"nothing is recorded of it, and its namespace {request.call.netns} is gone",
            )
        log.say("this pod was not accelerated by ADD; nothing to check")
        return
    addresses = results.pod_addresses(previous, request.call.ifname)
    missing = [
        *_missing_in_result(record, [each.address for each in addresses]),
        *differences,
        *_missing_in_netns(record, request.call.netns),
    ]
    if missing:
        raise CheckFailed("the pod is not accelerated as ADD left it", "; ".join(missing))


def _missing_in_result(record: Attachment, listed: list[str]) -> list[str]:
    return [
        f"address {address} was recorded by ADD and is not in prevResult"
        for address, _ in record.ips
        if address not in listed
    ]


def _missing_in_kernel(record: Attachment) -> list[str]:
    try:
        return _differences_in_kernel(record)
    except OSError as error:
        return [f"cgroup {record.cgroup} cannot be looked at: {error}"]


def _differences_in_kernel(record: Attachment) -> list[str]:
    with attachment.open_cgroup(record.cgroup, record.inode) as cgroup_fd:
        if cgroup_fd is None:
            return [f"cgroup {record.cgroup} (inode {record.inode}) is gone"]
        with attachment.attached(cgroup_fd, record.inode) as found:
            if not found:
                return [f"no sock_ops program is attached to cgroup {record.cgroup}"]
            owners = [each.record.id for each in found]
            expected = bytes(attachment.record_of(record))
            if any(bytes(each.record) == expected for each in found):
                return []
    if record.pod_id in owners:
        return [f"the kernel's record for cgroup {record.cgroup} differs from ADD's"]
    if any(owners):
        return [f"cgroup {record.cgroup} is accelerated for another attachment of this pod"]
    return [f"the kernel's record for cgroup {record.cgroup} is empty"]


def _missing_in_netns(record: Attachment, path: str) -> list[str]:
    from pyroute2 import IPRoute  # noqa: PLC0415 - 130 ms, for this command alone

    try:
        with netns.entered(path), IPRoute() as route:
            links = {link.get_attr("IFLA_IFNAME"): link["index"] for link in route.get_links()}
            present = {
                (address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS"), index)
                for address in route.get_addr()
                for index in [address["index"]]
            }
    except OSError as error:
        return [f"network namespace {path} cannot be looked into: {error}"]
    missing = []
    for address, interface in record.ips:
        if interface not in links:
            missing.append(f"interface {interface} is not in {path}")
        elif (address, links[interface]) not in present:
            missing.append(f"address {address} is not on interface {interface} in {path}")
    return sorted(set(missing))
