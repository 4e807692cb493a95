# SPDX-License-Identifier: Apache-2.0
"""What ADD puts into the kernel for one pod, and how it is taken out again.

One place names the owner of a cgroup's attachment: the pod record in the kernel. Its ``id`` is
that of the attachment that wrote it last. A runtime that re-creates a sandbox calls ADD for the
new one and then DEL for the old one, with the same pod and the same cgroup. That DEL finds
another ID in the record, and leaves the cgroup alone.
"""

from __future__ import annotations

import ctypes
import errno
import ipaddress
import os
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bpf import abi, bpfsys, pins

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_plugin.state import Attachment, Key, State

_GONE = (errno.ENOENT, errno.ENODEV)
_CGROUP_STORAGE = bpfsys.MAP_TYPE_CGROUP_STORAGE


class NotLoaded(Exception):
    """The programs are not pinned on this node; the message says what to do."""


def pod_id(container_id: str, ifname: str) -> int:
    """A stable, non-zero 63-bit number for an attachment: FNV-1a, folded from 64 bits.

    Container IDs are random, so this only has to keep their randomness.
    """
    digest = 0xCBF29CE484222325
    for byte in f"{container_id}:{ifname}".encode("utf-8", "surrogateescape"):
        digest = (digest ^ byte) * 0x100000001B3 % 2**64
    return (digest ^ digest >> 63) % 2**63 or 1


class Generation(NamedTuple):
    """The pins that ``current`` named when we looked."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    def open(self, pin: str) -> int:
        """The descriptor of one pin; raises NotLoaded."""
        path = self.folder / pin
        try:
            return bpfsys.obj_get(str(path))
        except OSError as error:
            raise NotLoaded(
                f"cannot open {path}: {error.strerror}; run tcpip-bypass-node load"
            ) from error


def current_generation(bpffs: str) -> Generation:
    """Resolved once per call, so that a load meanwhile cannot mix two; raises NotLoaded."""
    link = Path(bpffs) / pins.CURRENT
    try:
        return Generation(link.parent / link.readlink().name)
    except OSError as error:
        raise NotLoaded(
            f"the programs are not loaded: {link}: {error.strerror}; run tcpip-bypass-node load"
        ) from error


class Attached(NamedTuple):
    """A program of ours found on a cgroup, with its map of pod records. Descriptors are open."""

    program: bpfsys.Program
    fd: int
    pods_fd: int
    record: abi.Pod


def record_of(attachment: Attachment) -> abi.Pod:
    """The kernel's record for an attachment."""
    pod = abi.Pod(
        id=attachment.pod_id,
        flags=attachment.flags,
        proxy_uid=attachment.proxy_uid,
        ip_count=min(len(attachment.ips), abi.MAX_IPS),
        excluded_count=min(len(attachment.excluded_ports), abi.MAX_PORT_RANGES),
    )
    with suppress(OSError):
        pod.netns = os.stat(attachment.netns).st_ino  # noqa: PTH116 - a str, as CNI gives it
    for slot, (address, _) in zip(pod.ip, attachment.ips):
        ctypes.memmove(slot.word, _mapped(address), ctypes.sizeof(slot.word))
    for ports, (first, last) in zip(pod.excluded, attachment.excluded_ports):
        ports.first, ports.last = first, last
    return pod


def _mapped(address: str) -> bytes:
    """16 bytes in network order, IPv4 as ::ffff:a.b.c.d."""
    packed = ipaddress.ip_address(address).packed
    return packed if len(packed) == 16 else b"\0" * 10 + b"\xff\xff" + packed


def _storage_key(inode: int) -> bytes:
    return bytes(abi.CgroupStorageKey(cgroup_inode_id=inode, attach_type=bpfsys.CGROUP_SOCK_OPS))


@contextmanager
def _if_there() -> Iterator[None]:
    """For calls on what the kernel or another process may have removed just now."""
    try:
        yield
    except OSError as error:
        if error.errno not in _GONE:
            raise


@contextmanager
def open_cgroup(path: str, inode: int) -> Iterator[int | None]:
    """The cgroup's descriptor; None when it is gone, also when another has taken its path."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    with bpfsys.closing(fd):
        yield fd if os.fstat(fd).st_ino == inode else None


@contextmanager
def attached(cgroup_fd: int, inode: int) -> Iterator[list[Attached]]:
    """Every program of ours on this cgroup, of any generation; raises OSError."""
    ids: list[int] = []
    with _if_there():
        ids = bpfsys.prog_query(cgroup_fd)
    with ExitStack() as stack:
        found = (_open_ours(prog_id, inode, stack) for prog_id in ids)
        yield [each for each in found if each is not None]


def _open_ours(prog_id: int, inode: int, stack: ExitStack) -> Attached | None:
    try:
        fd = stack.enter_context(bpfsys.closing(bpfsys.prog_open(prog_id)))
    except OSError as error:
        if error.errno in _GONE:
            return None  # detached since the query
        raise
    program = bpfsys.prog_info(fd)
    pods_fd = None
    if program.name.startswith(pins.SOCK_OPS_NAME):
        pods_fd = _pods_map(program, stack)
    if pods_fd is None:
        return None
    return Attached(program, fd, pods_fd, read_record(pods_fd, inode))


def _pods_map(program: bpfsys.Program, stack: ExitStack) -> int | None:
    """The program's map of pod records: a program can have one cgroup storage map only."""
    for map_id in program.map_ids:
        fd = stack.enter_context(bpfsys.closing(bpfsys.map_open(map_id)))
        info = bpfsys.map_info(fd)
        if (info.type, info.value_size) == (_CGROUP_STORAGE, ctypes.sizeof(abi.Pod)):
            return fd
    return None


def read_record(pods_fd: int, inode: int) -> abi.Pod:
    """The cgroup's record; all zero when it has none."""
    try:
        data = bpfsys.map_lookup(pods_fd, _storage_key(inode), ctypes.sizeof(abi.Pod))
    except OSError as error:
        if error.errno in _GONE:
            return abi.Pod()
        raise
    return abi.Pod.from_buffer_copy(data)


def put(attachment: Attachment, generation: Generation) -> None:
    """Attach the programs to the pod's cgroup and write its record; raises OSError, NotLoaded.

    A program of this generation that is attached already, for a sandbox before this one, is
    taken over. One of another generation goes once this one is in place.
    """
    with open_cgroup(attachment.cgroup, attachment.inode) as cgroup_fd:
        if cgroup_fd is None:
            raise FileNotFoundError(
                errno.ENOENT, "the pod's cgroup is gone again", attachment.cgroup
            )
        with attached(cgroup_fd, attachment.inode) as before:
            move(cgroup_fd, attachment.inode, before, generation, record_of(attachment))


def move(
    cgroup_fd: int, inode: int, before: list[Attached], generation: Generation, record: abi.Pod
) -> None:
    """Put a cgroup's record, and with it the pod, under another generation; raises OSError."""
    with (
        bpfsys.closing(generation.open(pins.SOCK_OPS)) as program_fd,
        bpfsys.closing(generation.open(pins.PODS)) as pods_fd,
    ):
        new_id = bpfsys.prog_info(program_fd).id
        if new_id not in [each.program.id for each in before]:
            bpfsys.prog_attach(program_fd, cgroup_fd)
        bpfsys.map_update(pods_fd, _storage_key(inode), bytes(record))
        for each in before:
            if each.program.id != new_id:
                detach(each, cgroup_fd, inode)


def detach(each: Attached, cgroup_fd: int, inode: int) -> None:
    """Take one program of ours off a cgroup, which may go meanwhile; raises OSError."""
    with _if_there():
        # The record outlives the detachment on kernels from 5.9 on, until the cgroup goes.
        bpfsys.map_update(each.pods_fd, _storage_key(inode), bytes(abi.Pod()))
        bpfsys.prog_detach(each.fd, cgroup_fd)


def take_out(cgroup: str, inode: int, owner: int) -> None:
    """Detach from a cgroup what belongs to attachment ``owner``; raises OSError.

    A record of zero belongs to an ADD that did not live to write it (every ADD holds the lock
    from attaching to writing).
    """
    with open_cgroup(cgroup, inode) as cgroup_fd:
        if cgroup_fd is None:
            return
        with attached(cgroup_fd, inode) as found:
            for each in found:
                if each.record.id in (0, owner):
                    detach(each, cgroup_fd, inode)


def undo(state: State, bpffs: str, key: Key, record: Attachment | None) -> None:
    """Remove all there is of an attachment: the kernel's side first, its record last.

    Call it under the state's lock; raises OSError, and then the record is still there.
    """
    if record is not None:
        take_out(record.cgroup, record.inode, record.pod_id)
    forget_counters(bpffs, pod_id(*key))
    state.remove(key)


def forget_counters(bpffs: str, owner: int) -> None:
    """Remove a pod's counters from every generation that is pinned; raises OSError."""
    try:
        generations = [path for path in Path(bpffs).iterdir() if not path.is_symlink()]
    except (FileNotFoundError, NotADirectoryError):
        return
    for generation in generations:
        try:
            counters_fd = bpfsys.obj_get(str(generation / pins.COUNTERS))
        except (FileNotFoundError, NotADirectoryError):
            continue
        with bpfsys.closing(counters_fd):
            for hop in range(len(abi.HOPS)):
                with _if_there():
                    bpfsys.map_delete(counters_fd, bytes(abi.CounterKey(pod_id=owner, hop=hop)))
