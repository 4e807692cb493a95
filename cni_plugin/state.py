# SPDX-License-Identifier: Apache-2.0
"""What the plugin remembers of its attachments, and the node's mode, in the state folder.

One file per attachment, ``attachments/<containerID>:<ifname>.json``. ADD writes it before it
touches the kernel, and DEL removes it after the kernel is clean. So what is in the kernel is
always a part of what is written here. (Neither a container ID nor an interface name can hold a
colon.) No file is synced to disk: a power cut takes the kernel's side with it. A file that it
leaves torn is handled like one that is absent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cni_plugin import names

if TYPE_CHECKING:
    from collections.abc import Iterator

_SUFFIX = ".json"
_PART = ".part"
_LOCK_POLL_S = 0.005
_ABSENT = (FileNotFoundError, NotADirectoryError)


class Attachment(NamedTuple):
    """One ADD: what it put where. ``ips`` are pairs (address, interface)."""

    container_id: str
    ifname: str
    network: str
    netns: str
    pod_namespace: str
    pod_name: str
    pod_uid: str
    cgroup: str
    inode: int
    pod_id: int
    prog_id: int
    generation: str
    flags: int
    proxy_uid: int
    ips: list[list[str]]
    excluded_ports: list[list[int]]


_BLANK = Attachment("", "", "", "", "", "", "", "", 0, 0, 0, "", 0, 0, [], [])


class Key(NamedTuple):
    container_id: str
    ifname: str


class State:
    """The state folder. Methods raise OSError as the file system does, or say what else."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self._attachments = self.folder / names.ATTACHMENTS
        self._failures = self.folder / names.FAILURES

    def make(self) -> None:
        """Create the folders; the attachments are readable by root alone, under any umask."""
        self._attachments.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def locked(self, patience_s: float) -> Iterator[None]:
        """Hold the node's lock; TimeoutError after ``patience_s`` seconds.

        It is a flock(2) on the folder itself, so it needs no file that a full or read-only
        disk could refuse, and a process that dies lets go of it. Without the folder there is
        no state to guard.
        """
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fd = os.open(self._attachments, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except _ABSENT:
                yield
                return
            try:
                self._flock(fd, patience_s, deadline)
                if self._is_current(fd):
                    yield
                    return
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked meanwhile would keep the lock
                os.close(fd)

    def _is_current(self, fd: int) -> bool:
        """Whether ``fd`` still is the folder: an unload may have removed it while we waited."""
        try:
            return os.path.samestat(os.fstat(fd), self._attachments.stat())
        except _ABSENT:
            return False

    def _flock(self, fd: int, patience_s: float, deadline: float) -> None:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        errno.ETIMEDOUT,
                        f"another call has held the lock for more than {patience_s} s",
                        str(self._attachments),
                    ) from None
            time.sleep(_LOCK_POLL_S)

    def _path(self, key: Key) -> Path:
        return self._attachments / f"{key.container_id}:{key.ifname}{_SUFFIX}"

    def _files(self, key: Key) -> tuple[Path, Path, Path]:
        path = self._path(key)
        return path, path.with_suffix(_PART), self._failures / path.name

    def has(self, key: Key) -> bool:
        """Whether there is a file, whole, torn or half written, or a note of a failure."""
        return any(path.exists() for path in self._files(key))

    def write(self, attachment: Attachment) -> None:
        """Whole or not at all. Call it under the lock."""
        path, part, failure = self._files(Key(attachment.container_id, attachment.ifname))
        try:
            part.write_text(json.dumps(attachment._asdict(), indent=1), encoding="utf-8")
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):
            failure.unlink()

    def note_failure(self, key: Key, pod_namespace: str, pod_name: str, reason: str) -> None:
        """Tell `tcpip-bypass-node status` why there is no attachment, until remove() or write().

        It does not make the state folder: without one no programs are loaded, and status says that.
        """
        note = {"namespace": pod_namespace, "name": pod_name, "reason": reason}
        path = self._files(key)[2]
        path.parent.mkdir(mode=0o700, exist_ok=True)
        try:
            path.write_text(json.dumps({**key._asdict(), **note}), encoding="utf-8")
        except OSError:
            path.unlink(missing_ok=True)
            raise

    def has_failed(self, key: Key) -> bool:
        """Whether its last ADD has left a note of a failure."""
        return self._files(key)[2].exists()

    def read(self, key: Key) -> Attachment | None:
        """None when there is none or it is torn."""
        try:
            return _decode(self._path(key).read_bytes(), key)
        except _ABSENT:
            return None

    def remove(self, key: Key) -> None:
        """Absent is as good. Call it under the lock: a file half written goes as well."""
        for each in self._files(key):
            with contextlib.suppress(*_ABSENT):
                each.unlink()

    def keys(self, id_prefix: str = "") -> list[Key]:
        """All attachments with a file here, torn and half-written ones and failures included.

        Of those containers alone whose ID begins with `id_prefix`.
        """
        found: list[str] = []
        for folder in (self._attachments, self._failures):
            with contextlib.suppress(*_ABSENT):
                names_here = os.listdir(folder)  # noqa: PTH208 - a Path for each costs more
                found += [name for name in names_here if name.startswith(id_prefix)]
        keys = set()
        for name in found:
            container_id, colon, rest = name.partition(":")
            for suffix in (_SUFFIX, _PART):
                if colon and rest.endswith(suffix):
                    keys.add(Key(container_id, rest[: -len(suffix)]))
        return sorted(keys)

    def all(self) -> list[Attachment]:
        """Every attachment with a readable record."""
        records = [self.read(key) for key in self.keys()]
        return [record for record in records if record is not None]

    def node_mode(self) -> tuple[str, str]:
        """The node's mode and the reason for it, as ``tcpip-bypass-node load`` found them."""
        path = self.folder / names.NODE_JSON
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            mode, reasons = found["mode"], found.get("reasons", [])
            if mode not in names.MODES:
                raise ValueError(f"mode {mode!r:.40}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return "off", f"{path} cannot be read ({error}); run tcpip-bypass-node load"
        text = "; ".join(map(str, reasons)) if isinstance(reasons, list) else str(reasons)
        return mode, text or f"{path} says so"

    def switch(self) -> dict[str, Any] | None:
        """What the agent has read from the cluster's switch; None where there is none.

        Raises ValueError for a file that is not a JSON object, OSError for one that cannot be read.
        """
        path = self.folder / names.SWITCH_JSON
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except _ABSENT:
            return None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the cluster's switch, {path}, is damaged: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"the cluster's switch, {path}, is not a JSON object")
        return found


def _decode(text: bytes, key: Key) -> Attachment | None:
    """The record in ``text`` if it is whole, of the right types and this attachment's own."""
    try:
        members = json.loads(text)
        members.pop("keepalive_s", None)  # the first edition wrote it
        found = Attachment(**members)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    whole = (
        all(type(value) is type(blank) for value, blank in zip(found, _BLANK))
        and all(type(ip) is list and [type(x) for x in ip] == [str, str] for ip in found.ips)
        and all(
            type(ports) is list and [type(x) for x in ports] == [int, int]
            for ports in found.excluded_ports
        )
    )
    return found if whole and (found.container_id, found.ifname) == key else None
