# SPDX-License-Identifier: Apache-2.0
"""Says which folders have changed, through inotify(7): nothing runs until something happens.

A folder may be missing, come later, be replaced or vanish: its nearest parent that exists is
watched for it meanwhile. What inotify cannot see (another mount laid over a folder, a symlink
on the way to it that now leads elsewhere) shows when watch() is called again. A node that has run
out of inotify's instances or watches (fs.inotify.max_user_*) is looked at without, at each turn.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from inotify_simple import INotify, flags

from install.program import log

_MASK = (
    flags.CLOSE_WRITE
    | flags.CREATE
    | flags.DELETE
    | flags.MOVED_FROM
    | flags.MOVED_TO
    | flags.ATTRIB
    | flags.DELETE_SELF
    | flags.MOVE_SELF
    | flags.ONLYDIR
)


class Watch:
    """Folders by what they are watched for."""

    def __init__(self) -> None:
        self._inotify: INotify | None = None
        self._is_blind = False
        self._topics: dict[int, set[str]] = {}  # by watch descriptor
        self._folders: Mapping[str, set[Path]] = {}

    def descriptors(self) -> list[int]:
        """What is readable when something has happened."""
        return [self._inotify.fileno()] if self._inotify else []

    def close(self) -> None:
        if self._inotify:
            self._inotify.close()

    def watch(self, folders: Mapping[str, set[Path]]) -> None:
        """Watch these folders from now on, each for its topic, and no others."""
        self._folders = folders
        try:
            self._watch_all(folders)
        except OSError as error:
            self.close()  # all or none: some of them would hide that others are not seen
            self._inotify, self._topics = None, {}
            if not self._is_blind:
                log.warning("no_inotify", f"changes are seen late, once a minute: {error}")
            self._is_blind = True
            return
        if self._is_blind:
            log.info("inotify_recovered", "changes are seen at once again")
        self._is_blind = False

    def _watch_all(self, folders: Mapping[str, set[Path]]) -> None:
        """Raises OSError when the node has no instance or no watch left."""
        if self._inotify is None:
            self._inotify = INotify(nonblocking=True)
        before, self._topics = self._topics, {}
        for topic, paths in folders.items():
            for path in paths:
                self._add(topic, path)
        for descriptor in before.keys() - self._topics.keys():
            with suppress(OSError):  # the kernel has dropped it: its folder is gone
                self._inotify.rm_watch(descriptor)

    def _add(self, topic: str, path: Path) -> None:
        assert self._inotify
        for folder in (path, *path.parents):
            try:
                descriptor = self._inotify.add_watch(folder, _MASK)
            except OSError as error:
                if error.errno == errno.ENOSPC:  # more watches than fs.inotify allows
                    raise
                continue  # missing, or no folder
            self._topics.setdefault(descriptor, set()).add(topic)
            return

    def changed(self) -> set[str]:
        """The topics of which something may have happened since the last call; never waits."""
        if self._inotify is None:
            return set(self._folders)
        found: set[str] = set()
        for event in self._inotify.read(timeout=0):
            if event.mask & flags.Q_OVERFLOW:
                found |= self._folders.keys()
            found |= self._topics.get(event.wd, set())
        if found:
            self.watch(self._folders)  # what was missing may have come, and the other way round
        return found
