# SPDX-License-Identifier: Apache-2.0
"""Network namespaces by path, through setns(2) (os.setns came with Python 3.12)."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_OWN = Path("/proc/self/ns/net")


def is_own(path: str) -> bool:
    """Whether ``path`` is this process's own namespace; False when it is gone."""
    try:
        return os.path.samestat(Path(path).stat(), _OWN.stat())
    except (OSError, ValueError):
        return False


def _setns(fd: int, path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)


@contextmanager
def entered(path: str) -> Iterator[None]:
    """Run the body in the network namespace at ``path``; raises OSError."""
    own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(target, path)
        finally:
            os.close(target)
        try:
            yield
        finally:
            _setns(own, str(_OWN))
    finally:
        os.close(own)
