# SPDX-License-Identifier: Apache-2.0
"""Locks by flock(2) on what is there: nothing to create, nothing stale after a crash."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bpf import bpfsys


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock; raises BlockingIOError while another process has it."""
    with bpfsys.closing(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:  # closing is not enough: a child forked meanwhile would keep the lock
            fcntl.flock(fd, fcntl.LOCK_UN)


class FolderLock:
    """A lock for as long as a process lives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fd = -1

    def take(self) -> bool:
        """Whether this process has the lock now; the folder is made if need be.

        Call it again from time to time: a folder that was removed and made anew is another one.
        Raises OSError when the folder can be neither opened nor made.
        """
        if self._fd >= 0 and self._is_current():
            return True
        self.release()
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        return True

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._fd), self.folder.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # as in held()
            os.close(self._fd)
        self._fd = -1
