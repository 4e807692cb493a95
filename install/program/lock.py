# SPDX-License-Identifier: Apache-2.0
"""A lock on a folder, for as long as a process lives."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


class FolderLock:
    """flock(2) on the folder itself: no file to create, nothing stale after a crash."""

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
            os.close(self._fd)
        self._fd = -1
