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
* Of several files with one network name CRI-O keeps the first. So the file of one plugin, which its
  owner and others look for, stays as it is: a list of our own stands right before it, with the same
  network. It follows the file, and goes with it.
* containerd reloads on every event in the folder but the creation of a file (syncLoop in its
  cni_conf_syncer.go). A new file that is renamed into place from *another* folder is no more than
  a creation to it; so ours are written here, under names that no runtime reads.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cni_plugin import names, netconf
from cni_plugin.netconf import NetConf
from cni_plugin.protocol import CniError
from install.program import conflist, whole_file
from install.program.conflist import ConfError, Conflist, Entry, Json, NotValid

_LIST = ".conflist"
_SINGLE = (".conf", ".json")
_BAKED = ".cilium_bak"  # Cilium's name for a configuration that it may give back later
_OWN = f"-{names.PLUGIN}{_LIST}"  # ends the names of our lists: "-" sorts before "."
_OURS = f".{names.PLUGIN}"  # ends the names of files that no runtime reads
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
    left: tuple[str, ...] = ()  # on taking it out: lists of our own that others still need


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
        if self.is_single:
            return conflist.list_of_single(self.text, self.path.name)
        self.chain.check_valid()
        return self.text

    @property
    def is_single(self) -> bool:
        return self.path.suffix in _SINGLE

    @property
    def chain(self) -> Conflist:
        """Raises NotValid when it is no list of plugins."""
        return Conflist.parse(self.text)

    @property
    def original(self) -> Path | None:
        """Of a list of our own: the file of one plugin that it follows. It may be gone."""
        with contextlib.suppress(ConfError):
            made_from = self.chain.made_from
            if made_from and _own_name(made_from) == self.path.name.removesuffix(_BAKED):
                return self.path.with_name(made_from)
        return None


def _calls_us(value: object) -> bool:
    """Whether our entry is anywhere in it, as Multus has those of its delegates."""
    if isinstance(value, dict):
        return value.get("type") == names.PLUGIN or any(map(_calls_us, value.values()))
    return isinstance(value, list) and any(map(_calls_us, value))


def _own_name(single: str) -> str:
    """Our list of it. No file sorts between the two that a runtime would not have preferred."""
    return single.rpartition(".")[0] + _OWN


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
        if any(map(_first_edition, self._files((_LIST,)))):
            self.withdraw()
        outcome = self._retried(lambda: self._put_in(entry, dry=False))
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
        used = self._used()
        if used is None:
            return None
        file, chain = used
        at = chain.ours()
        if not any(at) or chain.version is None:  # none, or only where it cannot work
            return None
        return Ours(file.path, chain.name, chain.version, chain.plugins[at[-1]].value)

    def first_plugin(self) -> tuple[Path, str] | None:
        """The configuration that the runtime uses, and the type of its first plugin."""
        used = self._used()
        return used and (used[0].path, used[1].types()[0])

    def _used(self) -> tuple[_File, Conflist] | None:
        for file in self._files((_LIST, *_SINGLE)):
            with contextlib.suppress(ConfError):
                return file, Conflist.parse(file.as_list)
        return None

    def take_out(self) -> Outcome:
        """Our entry out of every configuration; our own lists go.

        Raises:
            OSError: as with put_in; our entry may be left then.
        """
        return self._retried(lambda: self._take_out(for_good=True))

    def withdraw(self) -> Outcome:
        """As take_out(), for a while: put_in() gives the entry its options back.

        Raises:
            OSError: as with put_in; our entry may be left then.
        """
        for file in self._files((_LIST, *_SINGLE)):
            with contextlib.suppress(ConfError):
                if at := file.chain.ours():
                    entry = file.chain.plugins[at[-1]].value
                    _write(self._withdrawn, json.dumps(entry), file.path.stat())
                    break
        return self._retried(lambda: self._take_out(for_good=False))

    @property
    def _withdrawn(self) -> Path:
        return self.path / _WITHDRAWN

    def _as_before(self, entry: Entry, own: Iterable[_File]) -> Entry:
        """The entry, with what was withdrawn, or stands in a list of our own that may go."""
        chains = [file.chain for file in own]
        found = [chain.plugins[at].value for chain in chains for at in chain.ours()]
        with contextlib.suppress(ValueError):  # not ours, or damaged
            found.insert(0, json.loads(_read(self._withdrawn) or b"null"))
        return replace(entry, withdrawn=next((e for e in found if isinstance(e, dict)), {}))

    def _retried(self, change: Callable[[], Outcome]) -> Outcome:
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
        files = list(self._files((_LIST, *_SINGLE)))
        own = {file.path: file for file in files if file.original}
        problems, entry = [], self._as_before(entry, own.values())
        used, changed = None, False
        for file in files:
            if file.path in own:
                continue
            mine = own.get(self.path / _own_name(file.path.name)) if file.is_single else file
            try:
                before = file.as_list
            except ConfError as error:
                if mine is None or mine.original != file.path:
                    effect = "containerd uses no later file either"
                    problems.append(f"{file.path} is left alone: {error}; {effect}")
                    continue
                problems.append(f"{mine.path} is left as it was: {file.path.name}: {error}")
                before = mine.text
            try:
                used, changed = self._written(file, before, mine, entry, dry=dry)
            except ConfError as error:
                changed = self._remove_unusable_entry(file, dry=dry)
                done = "no longer has our entry" if changed else "is left alone"
                problems.append(f"{file.path} {done}: {error}")
            break
        else:
            problems.append(
                f"there is no network configuration in {self.path} yet; if the runtime uses "
                "another folder: --cni-conf-dir, in the chart platform or cniConfDir"
            )
        for file in own.values():
            if file.path != used:
                changed |= self._let_go(file, files, dry=dry)
        return Outcome(used, changed, tuple(problems))

    def _remove_unusable_entry(self, file: _File, *, dry: bool) -> bool:
        """Takes our entry out if the plugin would fail each ADD in the list's CNI version.

        Returns whether it was so.
        """
        if file.is_single:
            return False
        is_one_of_several = 0 < len(file.chain.ours()) < len(file.chain.plugins)
        if not (is_one_of_several and file.chain.unknown_versions()):
            return False
        if not dry:
            _replace(file, conflist.without_entry(file.text))
        return True

    def _written(
        self, file: _File, before: str, mine: _File | None, entry: Entry, *, dry: bool
    ) -> tuple[Path, bool]:
        """The list that has our entry now, and whether it was changed: `mine`, if there is one.

        Raises:
            ConfError: the network of this file cannot have our entry.
        """
        after = conflist.with_entry(before, entry)
        if mine is None:
            path = self.path / _own_name(file.path.name)
            if os.path.lexists(path):
                raise ConfError(f"{path.name} is in the way, and not ours; rename or remove it")
            if not dry:
                _write(path, after, file.path.stat())
                _check_unchanged(file)
            return path, True
        after = conflist.with_entry(conflist.made_anew(mine.text, before), entry)
        if after != mine.text and not dry:
            _replace(mine, after)
            if mine is not file:
                _check_unchanged(file)
        return mine.path, after != mine.text

    def _let_go(self, file: _File, files: list[_File], *, dry: bool) -> bool:
        """A list of our own without our entry: as a rule, none. Returns whether it was changed.

        It stays as long as its original is there and others need it: istio-cni, which has put its
        plugin there, would wait for it for ever (getCNIConfigFilepath in cni/pkg/install of
        istio/istio, 86c9f01). Multus' daemon names it if it was the first when that started, and
        would fail each ADD.
        """
        original = file.original
        assert original
        others = [kind for kind in file.chain.types() if kind != names.PLUGIN]
        is_named = any(os.fsencode(file.path.name) in other.data for other in files)
        if not (os.path.lexists(original) and others and (is_named or len(others) > 1)):
            if not dry:
                _check_unchanged(file)
                _unlink(file.path)
            return True
        text = file.text
        with contextlib.suppress(ConfError):  # it stays as it was while its original is not valid
            text = conflist.made_anew(text, _File(original, _read(original)).as_list)
        text = conflist.without_entry(text)
        if text != file.text and not dry:
            _replace(file, text)
        return text != file.text

    def _take_out(self, *, for_good: bool) -> Outcome:
        problems, left, changed = list[str](), list[str](), None
        files = list(self._files((_LIST, *_SINGLE, _BAKED)))
        for file in files:
            try:
                if file.original:
                    if self._let_go(file, files, dry=False):
                        changed = changed or file.path
                    if file.path.exists():
                        left.append(
                            f"{file.path} stays without our entry, for other plugins use it; "
                            f"{file.original} is not read until they and it are gone"
                        )
                    continue
                if not file.chain.ours():
                    if _calls_us(json.loads(file.text)):
                        problems.append(f"{file.path} calls us by another plugin: its owner's task")
                    continue
                bare = conflist.without_entry(file.text)
            except ConfError as error:
                if f'"{names.PLUGIN}"'.encode() in file.data:
                    problems.append(f"{file.path} is left alone: {error}")
                continue
            if single := _first_edition(file):
                _check_unchanged(file)
                _give_back(single, file.path)
            else:
                _replace(file, bare)
            changed = changed or file.path
        if for_good and self._withdrawn.exists():
            _unlink(self._withdrawn)
        if for_good and not problems:
            self._sweep()
        return Outcome(changed, changed is not None, tuple(problems), tuple(left))

    def _sweep(self) -> None:
        """What was moved aside or not finished; by now no list needs it."""
        for path in self.path.glob(f"*{_OURS}"):
            _unlink(path)


def _read(path: Path) -> bytes:
    """Empty when it has just gone, or is a link that leads to no file."""
    try:
        return path.read_bytes()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return b""


def _aside(single: Path) -> Path:
    """Where the first edition kept a file of one plugin that it had made into a list."""
    return single.with_name(single.name + _OURS)


def _first_edition(file: _File) -> Path | None:
    """The file of one plugin of which this list was made, if it has no more than our entry."""
    with contextlib.suppress(ConfError):
        if file.chain.ours():
            bare = conflist.without_entry(file.text)
            for single in map(file.path.with_suffix, _SINGLE):
                kept = _read(_aside(single)).decode("utf-8", "surrogateescape")
                if kept and conflist.is_same(bare, conflist.list_of_single(kept, single.name)):
                    return single
    return None


def _give_back(single: Path, as_list: Path) -> None:
    """At any moment one of the two is there and valid. An owner's newer file stays."""
    if not os.path.lexists(single):
        os.link(_aside(single), single, follow_symlinks=False)
        whole_file.sync(single.parent)
    _unlink(as_list)
    _unlink(_aside(single))


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
        whole_file.link(file.path, file.path.readlink(), staged=_staged(file.path))
        whole_file.sync(file.path.parent)


def _write(
    path: Path, text: str, like: os.stat_result, before: Callable[[], None] = lambda: None
) -> None:
    """With that mode and owner; ``before`` may object at the last moment."""
    whole_file.write_synced(
        path,
        text.encode("utf-8", "surrogateescape"),
        staged=_staged(path),
        mode=like.st_mode & 0o7777,
        owner=(like.st_uid, like.st_gid),
        before=before,
    )


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}{_OURS}")


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
    whole_file.sync(path.parent)
