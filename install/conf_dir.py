# SPDX-License-Identifier: Apache-2.0
"""The folder of network configurations: which one the runtime uses, and our entry in it.

Which one, as their sources have it:

* containerd (loadFromConfDir in opts.go of containerd/go-cni, 3dbce1d) and CRI-O (loadNetworks in
  pkg/ocicni/ocicni.go of cri-o/ocicni, 18fd1eb) sort the names of all ``.conf``, ``.conflist`` and
  ``.json`` by bytes. Everything but a ``.conflist`` is the configuration of one plugin.
* CRI-O takes the first one that is valid and whose plugins all answer VERSION with the list's
  version. So our program is in place before our entry is, and goes after it.
* containerd takes the first one; when that is not valid, it has no network at all until the next
  change. A later file is then not used by it, and our entry in there does no harm.
* containerd reloads on every event in the folder but the creation of a file (syncLoop in its
  cni_conf_syncer.go). A new file that is renamed into place from *another* folder is no more than
  a creation to it; so ours are written here, under names that no runtime reads.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cni_plugin import names, netconf
from cni_plugin.netconf import NetConf
from cni_plugin.protocol import CniError
from install import conflist
from install.conflist import ConfError, Conflist, Entry, Json, NotValid

_LIST = ".conflist"
_SINGLE = (".conf", ".json")
_BAKED = ".cilium_bak"  # Cilium's name for a configuration that it may give back later
_OURS = ".tcpip-bypass"  # ends the names of files that we wrote here or moved aside
_WITHDRAWN = f"entry{_OURS}"  # what our entry held when it was withdrawn
_TRIES = 5


class _Overtaken(Exception):
    """Somebody else wrote the file after we had read it."""


@dataclass(frozen=True)
class Outcome:
    """What was done, and what an operator should know of."""

    conflist: Path | None  # that has our entry now; on taking it out: that had it
    changed: bool
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Ours:
    """Our entry in the configuration that the runtime uses."""

    path: Path
    network: str
    cni_version: str
    entry: Json


def parsed(entry: Json, where: Path) -> NetConf:
    """Our entry's keys, with the defaults. Raises ValueError, which names `where` it stands."""
    try:
        return netconf.parse(entry)
    except (CniError, AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"our entry in {where} is not valid: {error}") from error


@dataclass(frozen=True)
class _File:
    """One configuration, as it was read."""

    path: Path
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "surrogateescape")

    @property
    def as_list(self) -> str:
        """Raises NotValid when a runtime would not take it."""
        if self.path.is_symlink() and not self.path.exists():
            raise NotValid(f"it is a link to {self.path.readlink()}, which is not to be seen here")
        if self.path.suffix in _SINGLE:
            return conflist.list_of_single(self.text, self.path.name)
        Conflist.parse(self.text).check_valid()
        return self.text


@dataclass(frozen=True)
class ConfDir:
    """Usually /etc/cni/net.d. Changes are made by one process at a time: see installer.alone."""

    path: Path

    def put_in(self, entry: Entry) -> Outcome:
        """Our entry into the configuration that the runtime uses; nothing if it is there.

        And out of it when its owner has made it one in whose version the plugin cannot answer.

        Raises:
            OSError: something cannot be read or written, or somebody else never stops writing.
        """
        outcome = self._until_settled(lambda: self._put_in(entry, dry=False))
        if outcome.conflist and self._withdrawn.exists():
            _unlink(self._withdrawn)
        return outcome

    def lacks(self, entry: Entry) -> bool:
        """Whether put_in would write."""
        return self.would_put_in(entry).changed

    def would_put_in(self, entry: Entry) -> Outcome:
        """What put_in would do; nothing is written. Raises OSError."""
        return self._put_in(entry, dry=True)

    def ours(self) -> Ours | None:
        """None when the configuration that the runtime uses is not there or does without us."""
        for file in self._files((_LIST, *_SINGLE)):
            with contextlib.suppress(ConfError):
                chain = Conflist.parse(file.as_list)
                at = chain.ours()
                if not any(at) or chain.version is None:  # none, or only where it cannot work
                    return None
                return Ours(file.path, chain.name, chain.version, chain.plugins[at[-1]].value)
        return None

    def take_out(self) -> Outcome:
        """Our entry out of every configuration; one that we made into a list is itself again.

        Raises:
            OSError: as with put_in; our entry may be left then.
        """
        return self._until_settled(lambda: self._take_out(for_good=True))

    def withdraw(self) -> Outcome:
        """As take_out(), for a while: put_in() gives the entry its options back.

        Raises:
            OSError: as with put_in; our entry may be left then.
        """
        if ours := self.ours():
            _write(self._withdrawn, json.dumps(ours.entry), ours.path.stat())
        return self._until_settled(lambda: self._take_out(for_good=False))

    @property
    def _withdrawn(self) -> Path:
        return self.path / _WITHDRAWN

    def _as_before(self, entry: Entry) -> Entry:
        """The entry, with what was withdrawn."""
        try:
            before = json.loads(_read(self._withdrawn) or b"{}")
        except ValueError:  # not ours, or damaged
            return entry
        return replace(entry, withdrawn=before) if isinstance(before, dict) else entry

    def _until_settled(self, change: Callable[[], Outcome]) -> Outcome:
        for _ in range(_TRIES):
            try:
                return change()
            except _Overtaken:
                continue
        raise OSError(errno.EAGAIN, "somebody else writes in it all the time", str(self.path))

    def _files(self, suffixes: tuple[str, ...]) -> Iterator[_File]:
        """In the runtimes' order."""
        try:
            found = [path for path in self.path.iterdir() if path.suffix in suffixes]
        except FileNotFoundError:
            return
        for path in sorted(found, key=os.fsencode):
            if not path.is_dir():
                yield _File(path, _read(path))

    def _put_in(self, entry: Entry, *, dry: bool) -> Outcome:
        problems, entry = [], self._as_before(entry)
        for file in self._files((_LIST, *_SINGLE)):
            try:
                before = file.as_list
            except ConfError as error:
                problems.append(
                    f"{file.path} is left alone: {error}; containerd uses no later file either"
                )
                continue
            try:
                after = conflist.with_entry(before, entry)
                return self._written(file, after, tuple(problems), dry=dry)
            except ConfError as error:
                changed = self._is_spared(file, dry=dry)
                done = "no longer has our entry" if changed else "is left alone"
                problems.append(f"{file.path} {done}: {error}")
                return Outcome(None, changed, tuple(problems))
        problems.append(f"there is no network configuration in {self.path} yet")
        return Outcome(None, False, tuple(problems))

    def _is_spared(self, file: _File, *, dry: bool) -> bool:
        """Whether our entry had to go: in the list's version we answer each ADD with an error."""
        chain = Conflist.parse(file.as_list)
        is_one_of_several = 0 < len(chain.ours()) < len(chain.plugins)
        if not (is_one_of_several and chain.unknown_versions()):
            return False
        if not dry:
            _replace(file, conflist.without_entry(file.text))
        return True

    def _written(self, file: _File, text: str, problems: tuple[str, ...], *, dry: bool) -> Outcome:
        if file.path.suffix not in _SINGLE:
            if text != file.text and not dry:
                _replace(file, text)
            return Outcome(file.path, text != file.text, problems)
        as_list = file.path.with_suffix(_LIST)
        if as_list.exists() and not self._is_made_by_us(as_list, file.path):
            raise ConfError(f"it would become {as_list.name}, which is there already")
        if not dry:
            # At any moment one of the two is there and valid. (A runtime that has listed the one
            # before it goes, and reads it after, finds no network, and reads again at once.)
            _keep_aside(file.path)
            _write(as_list, text, file.path.stat())
            _check_unchanged(file)
            _unlink(file.path)
        return Outcome(as_list, True, problems)

    def _is_made_by_us(self, as_list: Path, single: Path) -> bool:
        there = as_list.read_bytes().decode("utf-8", "surrogateescape")
        return _aside(single).exists() and conflist.has_entry(there)

    def _take_out(self, *, for_good: bool) -> Outcome:
        problems, changed = [], None
        for file in self._files((_LIST, *_SINGLE, _BAKED)):
            try:
                if not conflist.has_entry(file.text):
                    continue
                bare = conflist.without_entry(file.text)
            except ConfError as error:
                if names.PLUGIN.encode() in file.data:
                    problems.append(f"{file.path} is left alone: {error}")
                continue
            if not self._given_back(file, bare):
                _replace(file, bare)
            changed = changed or file.path
        if for_good and not problems:
            self._sweep()
        return Outcome(changed, changed is not None, tuple(problems))

    def _given_back(self, file: _File, bare: str) -> bool:
        """If we made this of another configuration and nobody touched it since: that one again."""
        for suffix in _SINGLE:
            original = file.path.with_suffix(suffix)
            for kept in (_aside(original), original):
                if not _is_list_of(bare, kept, original.name):
                    continue
                _check_unchanged(file)
                if not original.exists():
                    _rename(kept, original)
                _unlink(file.path)
                return True
        return False

    def _sweep(self) -> None:
        """What we moved aside or did not get to finish; by now no list needs it."""
        for path in self.path.glob(f"*{_OURS}"):
            _unlink(path)


def _read(path: Path) -> bytes:
    """Empty when it has just gone, or is a link to nothing."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _aside(single: Path) -> Path:
    """Where a configuration waits that we made into a list: no runtime reads that suffix."""
    return single.with_name(single.name + _OURS)


def _keep_aside(single: Path) -> None:
    """Another name for it (or for the link that it is); replaces one that was kept before."""
    staged = _staged(_aside(single))
    staged.unlink(missing_ok=True)
    os.link(single, staged, follow_symlinks=False)
    _rename(staged, _aside(single))
    staged.unlink(missing_ok=True)  # rename(2) leaves it when both are the same file already


def _is_list_of(bare: str, single: Path, name: str) -> bool:
    """Whether the list is what a runtime makes of that configuration, and no more."""
    try:
        text = _read(single).decode("utf-8", "surrogateescape")
        return conflist.is_same(bare, conflist.list_of_single(text, name))
    except ConfError:
        return False


def _check_unchanged(file: _File) -> None:
    """Another writer's change must not be lost; what is left is the time of a rename(2)."""
    if _read(file.path) != file.data:
        raise _Overtaken


def _replace(file: _File, text: str) -> None:
    """The file, with another content.

    A symbolic link is written through: its target is what the owner goes on maintaining, and with
    a copy in its place the runtime would never see the owner's next change. The runtime watches
    only this folder, so the link is made anew, which is an event.
    """
    target = file.path.resolve(strict=True)
    _write(target, text, target.stat(), before=lambda: _check_unchanged(file))
    if file.path.is_symlink():
        staged = _staged(file.path)
        staged.unlink(missing_ok=True)
        staged.symlink_to(file.path.readlink())
        _rename(staged, file.path)


def _write(
    path: Path, text: str, like: os.stat_result, before: Callable[[], None] = lambda: None
) -> None:
    """Atomically and synced, with that mode and owner; ``before`` may object at the last moment."""
    staged = _staged(path)
    try:
        staged.unlink(missing_ok=True)
        fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
            os.fchmod(fd, like.st_mode & 0o7777)  # before it is another's, which takes CAP_FOWNER
            os.fchown(fd, like.st_uid, like.st_gid)
            file.flush()
            os.fsync(fd)
        before()
        _rename(staged, path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}{_OURS}")


def _rename(old: Path, new: Path) -> None:
    old.rename(new)
    sync_folder(new.parent)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What was renamed in this folder is so after a power cut, too."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
