# SPDX-License-Identifier: Apache-2.0
"""The frozen plugin's folder on a node, and how one is replaced by another while pods come and go.

``<bin-dir>/tcpip-bypass`` is a symbolic link into ``<bin-dir>/.tcpip-bypass/<digest>/``; a version
is swapped in by renaming another link over it. The link is relative, because the agent sees the
folder elsewhere than the runtime does. The program finds the rest of its folder through
/proc/self/exe, that is behind the link, so an execution goes on with the folder that it was started
from. The folder from before therefore stays until the next swap.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cni_plugin import names
from install.program import host, trial, whole_file

_STORE = f".{names.PLUGIN}"
_STAGED = f".{names.PLUGIN}.next"
_PART = ".part"
_DIGEST_LENGTH = 16


class InstallError(Exception):
    """Nothing was installed; the message says what to do about it."""


class DoesNotRun(InstallError):
    """The node cannot run the plugin; the message says why."""


def digest(folder: Path) -> str:
    """Names, contents and executability of all files in it; 23 MB take 15 ms."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        executable = kind == "file" and bool(path.stat().st_mode & 0o100)
        total.update(f"{path.relative_to(folder)}\0{kind}\0{executable}\0".encode())
        if kind == "link":
            total.update(os.fsencode(path.readlink()))
        elif kind == "file":
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:_DIGEST_LENGTH]


@dataclass(frozen=True)
class PluginFiles:
    """The plugin in one bin-dir, from one source. The source does not change meanwhile."""

    source: Path
    bin_dir: Path
    proc: Path = Path("/proc")  # the host's, wherever it is mounted

    @property
    def link(self) -> Path:
        return self.bin_dir / names.PLUGIN

    @property
    def store(self) -> Path:
        return self.bin_dir / _STORE

    @functools.cached_property
    def wanted(self) -> str:
        """The source's digest.

        Raises:
            InstallError: there is nothing to install.
        """
        if not (self.source / names.PLUGIN).is_file():
            raise InstallError(
                f"there is no frozen plugin in {self.source}; run `make build`, or name the folder "
                "with --plugin-dir"
            )
        return digest(self.source)

    def is_intact(self) -> bool:
        """Whether the link leads to a folder with the source's very content."""
        folder = self._current()
        return folder is not None and folder.is_dir() and digest(folder) == self.wanted

    def install(self) -> bool:
        """Whether anything had to be done.

        Raises:
            DoesNotRun: the node cannot run it.
            InstallError: the source is missing, or it could not be tried.
            OSError: the folder cannot be written.
            What was installed before still is, and nothing else.
        """
        if self.is_intact():
            return False
        before = self._current()
        folder = self._stored()
        self._swap_in(folder)
        self._remove_all_but(folder, before)
        return True

    def check_runs(self) -> None:
        """Of the plugin that the runtime finds, whole or not.

        Raises:
            DoesNotRun: the node cannot run it, or there is none.
            InstallError: it could not be tried.
        """
        if self.has_stub:
            raise DoesNotRun("the plugin was removed from this node")
        self._try(self.link)

    def check_source_runs(self) -> None:
        """Of the plugin that is to be installed, where it is now. Raises as check_runs()."""
        self._try(self.source / names.PLUGIN, self.source)

    def _try(self, program: Path, folder: Path | None = None) -> None:
        """As the node would run it. Raises as check_runs(). ``folder`` is one that it is below."""
        try:
            on_node = self._on_node(program, folder or self.bin_dir)
            why = trial.why_not(on_node, self.proc)
        except (OSError, trial.NotTried) as error:
            raise InstallError(
                f"whether the node can run the plugin could not be tried: {error}"
            ) from error
        if why:
            raise DoesNotRun(f"the node cannot run the plugin: {why}")

    def _on_node(self, program: Path, folder: Path) -> Path:
        """What the node calls it."""
        if self.proc == host.OWN_PROC:
            return program
        return host.path_on_node(folder, self.proc) / program.relative_to(folder)

    def _current(self) -> Path | None:
        """The folder in our store that the link names."""
        if not self.link.is_symlink():
            return None
        parts = self.link.readlink().parts
        is_ours = len(parts) == 3 and parts[0] == _STORE and parts[2] == names.PLUGIN
        return self.store / parts[1] if is_ours else None

    def _stored(self) -> Path:
        """A folder in the store with the source's content, synced and tried; made if need be."""
        folder, copies = self.store / self.wanted, 0
        while folder.exists():
            if digest(folder) == self.wanted:
                self._try(folder / names.PLUGIN)
                return folder
            copies += 1  # that one is damaged, but executions may run from it
            folder = self.store / f"{self.wanted}.{copies}"
        self.store.mkdir(exist_ok=True)
        self.store.chmod(0o755)
        part = self.store / _PART
        shutil.rmtree(part, ignore_errors=True)
        try:
            shutil.copytree(self.source, part, symlinks=True)
            _make_durable(part)
            self._try(part / names.PLUGIN)
            part.rename(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            with contextlib.suppress(OSError):  # unless there are other versions in it
                self.store.rmdir()
            raise
        whole_file.sync(self.store)
        return folder

    def _swap_in(self, folder: Path) -> None:
        target = Path(_STORE, folder.name, names.PLUGIN)
        whole_file.link(self.link, target, staged=self.bin_dir / _STAGED)
        whole_file.sync(self.bin_dir)

    def _remove_all_but(self, *kept: Path | None) -> None:
        in_use = {_identity(self.proc / str(pid) / "exe") for pid in self.running()}
        for folder in self.store.iterdir():
            if folder not in kept and in_use.isdisjoint(map(_identity, folder.glob("*"))):
                shutil.rmtree(folder, ignore_errors=True)

    def running(self) -> list[int]:
        """The PIDs of executions of plugins installed here; to see all takes CAP_SYS_PTRACE.

        What is executed for most of the time is the loader in a plugin's folder.
        """
        programs = {_identity(path) for path in (*self.store.glob("*/*"), self.link)}
        found = []
        for process in self.proc.glob("[0-9]*"):
            executable = _identity(process / "exe")
            if executable is not None and executable in programs:
                found.append(int(process.name))
        return found

    @property
    def is_there(self) -> bool:
        """Whether there is a plugin, whole or damaged, or what is left of one."""
        return self.link.is_symlink() or self.link.exists() or self.store.exists()

    @property
    def has_stub(self) -> bool:
        """Whether an earlier uninstall left what answers for us: start.c, alone."""
        return self.link.is_file() and not self.link.is_symlink()

    def put_stub(self) -> None:
        """From now on the stub is called in our place. What was there stays in the store.

        It is the program that starts the plugin, without the plugin's folder.
        """
        starters = (folder / names.PLUGIN for folder in (self.source, self._current()) if folder)
        starter = next((path for path in starters if path.is_file()), None)
        if starter and not self.has_stub and self.bin_dir.exists():
            staged = self.bin_dir / _STAGED
            whole_file.write_synced(self.link, starter.read_bytes(), staged=staged, mode=0o755)

    def remove(self) -> bool:
        """Whether there was anything. A stub stays; nothing else may call the plugin any more."""
        there = self.store.exists() or (self.is_there and not self.has_stub)
        if not self.has_stub:
            self.link.unlink(missing_ok=True)
        (self.bin_dir / _STAGED).unlink(missing_ok=True)
        if self.store.exists():
            shutil.rmtree(self.store)
        if there:
            whole_file.sync(self.bin_dir)
        return there

    def remove_stub(self) -> None:
        """Absent is as good."""
        if self.has_stub:
            self.link.unlink()
            whole_file.sync(self.bin_dir)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode: the same file, whatever another mount namespace calls it."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _make_durable(folder: Path) -> None:
    """Makes it readable by all, whatever the umask was, and writes it to the disk."""
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            continue
        executable = path.is_dir() or path.stat().st_mode & 0o100
        path.chmod(0o755 if executable else 0o644)
        whole_file.sync(path)
