# SPDX-License-Identifier: Apache-2.0
"""Files and links that change in one step: a reader sees the old content or the new, whole.

Each is made under another name and renamed. Whatever fails, what was there before stays, and
nothing else is left. Every function raises OSError as the file system does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path


def write(path: Path, text: str) -> None:
    """A file of the state folder, a tmpfs: readable by all, and not synced."""
    with _staging(path.with_suffix(".part")) as staged:
        staged.write_text(text)
        staged.replace(path)


def write_synced(
    path: Path,
    content: bytes,
    *,
    staged: Path,
    mode: int,
    owner: tuple[int, int] | None = None,
    before: Callable[[], None] = lambda: None,
) -> None:
    """A file that a power cut leaves whole, made as ``staged`` in the same folder.

    ``owner`` is its user and group, by default this process'. ``before`` may object, by an
    exception, right before the file takes its place.
    """
    with _staging(staged):
        fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            os.fchmod(fd, mode)  # before it is another's, which takes CAP_FOWNER
            if owner is not None:
                os.fchown(fd, *owner)
            file.flush()
            os.fsync(fd)
        before()
        staged.rename(path)
    sync(path.parent)


def link(path: Path, target: Path, *, staged: Path) -> None:
    """A symbolic link to ``target``, made as ``staged`` in the same folder; not synced."""
    with _staging(staged):
        staged.symlink_to(target)
        staged.rename(path)


def sync(path: Path) -> None:
    """A power cut leaves the file, or the names in the folder, as they are now."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _staging(staged: Path) -> Iterator[Path]:
    """Removes what an earlier call has left under that name and, after a failure, this one's."""
    staged.unlink(missing_ok=True)
    try:
        yield staged
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
