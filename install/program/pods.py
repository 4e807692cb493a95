# SPDX-License-Identifier: Apache-2.0
"""The pods that have our programs, as the kernel knows them.

The state folder records what ADD intended; the kernel has what is attached. Moving and removing
programs follows the kernel. A record may be lost. Where two records name one cgroup (a sandbox that
was re-created), only the kernel knows its owner.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bpf import abi
from cni_plugin import attachment, cgroup
from cni_plugin.attachment import Attached
from cni_plugin.state import Attachment
from install.program import log


@dataclass(frozen=True)
class AttachedCgroup:
    """A cgroup with programs of ours; the descriptors are open while it is being looked at."""

    path: Path
    fd: int
    inode: int
    programs: list[Attached]

    @property
    def record(self) -> abi.Pod | None:
        """The pod's record; None when an ADD or a load died before it was written."""
        return next((each.record for each in self.programs if each.record.id), None)

    def take_out(self) -> None:
        for each in self.programs:
            attachment.detach(each, self.fd, self.inode)


def take_out(record: Attachment) -> None:
    """Detaches the very program that is recorded; raises OSError."""
    with attachment.open_cgroup(record.cgroup, record.inode) as fd:
        if fd is None:
            return
        with attachment.attached(fd, record.inode) as found:
            for each in found:
                if each.program.id == record.prog_id:
                    attachment.detach(each, fd, record.inode)


def has_cgroup(record: Attachment) -> bool:
    """Whether the cgroup that the attachment was made for is still there."""
    with attachment.open_cgroup(record.cgroup, record.inode) as fd:
        return fd is not None


def programs_of(record: Attachment) -> list[int]:
    """The IDs of our programs on the pod's cgroup that know it by this attachment."""
    with attachment.open_cgroup(record.cgroup, record.inode) as fd:
        if fd is None:
            return []
        with attachment.attached(fd, record.inode) as found:
            return [each.program.id for each in found if each.record.id == record.pod_id]


def attached_cgroups(program_ids: set[int]) -> Iterator[AttachedCgroup]:
    """Every cgroup to which one of these programs is attached."""
    mount = cgroup.find_mount()
    if mount is None:
        return
    for name, _, _ in os.walk(mount):
        try:
            inode = Path(name).stat().st_ino
            with attachment.open_cgroup(name, inode) as fd:
                if fd is None:
                    continue
                with attachment.attached(fd, inode) as found:
                    ours = [each for each in found if each.program.id in program_ids]
                    if ours:
                        yield AttachedCgroup(Path(name), fd, inode, ours)
        except OSError as error:
            if not isinstance(error, FileNotFoundError):  # a pod that has just gone
                said = f"its programs cannot be looked at; tried again: {error}"
                log.warning("cgroup_skipped", said, cgroup=name)
