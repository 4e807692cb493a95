# SPDX-License-Identifier: Apache-2.0
"""Install and uninstall: the plugin's program and our entry, in the order that is always safe.

A program that the network configuration names and that is missing or broken stops every pod of the
node. So the program is there first and leaves last; each step is atomic, and a process that dies
between two of them leaves a node that works and that the next call puts right.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from cni_plugin import names, netconf, protocol, schema
from install.program.conf_dir import ConfDir, Outcome
from install.program.conflist import Entry
from install.program.lock import FolderLock
from install.program.plugin_files import DoesNotRun, InstallError, PluginFiles

_LOCK_PATIENCE_S = 60.0
_LEAVING_PATIENCE_S = 10.0
_QUIET_S = 0.5  # a runtime that has just read the old configuration calls us within this time
_POLL_S = 0.05

# Keys of the schema that the conflist, the runtime or install itself fill in.
_NOT_OPTIONS = {
    "args", "bpffs", "capabilities", "cniVersion", "cniVersions", "disableCheck", "disableGC",
    "loadOnlyInlinedPlugins", "name", "prevResult", "runtimeConfig", "stateDir", "type",
}  # fmt: skip


@dataclass(frozen=True)
class Places:
    """Where the network configurations and plugins of a node are, as this process sees them."""

    conf_dir: Path
    bin_dir: Path
    plugin_dir: Path  # where the frozen plugin comes from
    host_proc: Path  # a /proc of the host's PID namespace

    @functools.cached_property
    def files(self) -> PluginFiles:
        return PluginFiles(self.plugin_dir, self.bin_dir, self.host_proc)

    def folders(self) -> list[Path]:
        """Every folder in which something of ours can be damaged, as far as they are there."""
        stored = [self.files.store, *self.files.store.rglob("*/")]
        return [each for each in (self.conf_dir, self.bin_dir, *stored) if each.is_dir()]


class Withdrawn(DoesNotRun):
    """Our entry was just taken out of the network configuration, for pods would have failed."""


@dataclass(frozen=True)
class Installed:
    """What install() did."""

    program_changed: bool
    conf: Outcome


@dataclass(frozen=True)
class Uninstalled:
    """What uninstall() did."""

    conf: Outcome
    program_removed: bool
    left_stub: bool
    still_running: list[int]  # executions of the plugin that did not end in time


def install(places: Places, entry: Entry) -> Installed:
    """Whatever is missing, damaged or outdated; nothing when all is well, so it also repairs.

    When it raises and the plugin that is installed does not run, no configuration names it.

    Raises:
        DoesNotRun: the node cannot run the new plugin, or no longer the installed one. Or, before
            our entry is in, the runtime does not look for plugins there.
        InstallError: the plugin is missing, or cannot be read, written or tried.
        OSError: a configuration cannot be read or written.
    """
    files, conf = places.files, ConfDir(places.conf_dir)
    if conf.ours() is None:
        check_is_looked_for(places)
    with _as_install_error():
        places.bin_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
    with alone(places.bin_dir):
        try:
            with _as_install_error():
                intact = files.is_intact()  # reads 23 MB: once, when all is well
                if not intact:
                    _check_writable(places.bin_dir)
            if conf.lacks(entry):
                _check_writable(places.conf_dir)
            with _as_install_error():
                changed = not intact and files.install()
            if intact:
                files.check_runs()
        except (InstallError, OSError) as error:
            _spare_pods(files, conf, error)
        return Installed(changed, conf.put_in(entry))


@contextlib.contextmanager
def _as_install_error() -> Iterator[None]:
    """What the disk refuses of the plugin. An OSError is then about the configuration."""
    try:
        yield
    except OSError as error:
        raise InstallError(str(error)) from error


def check_is_looked_for(places: Places) -> None:
    """The runtime looks for ours where it finds the plugin that makes the pods' interfaces.

    Raises DoesNotRun if that one is not in the folder that we were told of; OSError.
    """
    used = ConfDir(places.conf_dir).first_plugin()
    if used and not os.path.lexists(places.bin_dir / used[1]):
        raise DoesNotRun(
            f"does the runtime look for plugins in {places.bin_dir}? {used[1]}, which {used[0]} "
            "names, is not there: name its folder with --cni-bin-dir; if the runtime looks in "
            "both, link it there"
        )


def _spare_pods(files: PluginFiles, conf: ConfDir, problem: Exception) -> NoReturn:
    """Raises the problem; if the installed plugin does not run either, our entry goes first.

    A stub takes the plugin's place where something may still call it: a runtime that has cached the
    configuration, an entry that cannot be taken out, or is not ours to take out.
    """
    try:
        files.check_runs()
    except DoesNotRun as why:
        try:
            out = conf.withdraw()
        except OSError as error:
            _put_stub_if_possible(files)
            raise DoesNotRun(f"{problem}; our entry cannot be taken out: {error}") from why
        if out.changed or out.problems or files.is_there:
            _put_stub_if_possible(files)
        if not out.changed:
            raise problem from None
        raise Withdrawn(f"{problem}; so {out.conflist} no longer has our entry") from why
    except InstallError:  # not known
        pass
    raise problem


def _put_stub_if_possible(files: PluginFiles) -> None:
    with contextlib.suppress(OSError):
        files.put_stub()


def uninstall(places: Places, switch_off: Callable[[], None], *, purge: bool) -> Uninstalled:
    """No pod any more, then no execution, then nothing in the kernel, then no program.

    Pods from before may get a DEL later, from a runtime that cached the configuration of their
    time (CRI-O does, also for pods that were none of our business). And a configuration that is not
    ours to change may still name us. For them a stub takes the program's place: it lets pods start
    and end. With ``purge`` it goes, unless something still names us.

    Raises:
        OSError: something cannot be written. As long as our entry is in a configuration, the
            program stays.
    """
    files, folder = places.files, ConfDir(places.conf_dir)
    with alone(places.bin_dir):
        conf = folder.take_out()
        still_running = _wait_until_unused(files)
        switch_off()
        again = folder.take_out()  # a writer may have put back what it had read before
        if files.is_there or conf.changed or conf.problems:
            files.put_stub()
        removed = files.remove()
        if purge and not again.problems:
            files.remove_stub()
        done = again if again.changed else replace(conf, problems=again.problems, left=again.left)
        return Uninstalled(done, removed, files.has_stub, still_running)


def _wait_until_unused(files: PluginFiles) -> list[int]:
    """Executions that are still there after a while."""
    deadline = time.monotonic() + _LEAVING_PATIENCE_S
    quiet_until = time.monotonic() + _QUIET_S
    while time.monotonic() < min(deadline, quiet_until):
        if files.running():
            quiet_until = time.monotonic() + _QUIET_S
        time.sleep(_POLL_S)
    return files.running()


def _check_writable(folder: Path) -> None:
    if not os.access(folder, os.W_OK):
        said = "cannot be written, and nothing was changed; is it mounted read-only?"
        raise OSError(errno.EROFS, said, str(folder))


@contextlib.contextmanager
def alone(bin_dir: Path) -> Iterator[None]:
    """No other install or uninstall on this node; TimeoutError after a minute."""
    if not bin_dir.exists():  # so nothing can be installed there
        yield
        return
    lock, deadline = FolderLock(bin_dir), time.monotonic() + _LOCK_PATIENCE_S
    while not lock.take():
        if time.monotonic() > deadline:
            raise TimeoutError(
                errno.ETIMEDOUT, "another install or uninstall is running", str(bin_dir)
            )
        time.sleep(_POLL_S)
    try:
        yield
    finally:
        lock.release()


def entry(bpffs: Path, state_dir: Path, options: dict[str, Any] | None) -> Entry:
    """Our entry for a node with these folders.

    Raises:
        InstallError: with everything that is wrong with the options.
    """
    folders = {
        key: str(folder)
        for key, folder, default in (
            ("bpffs", bpffs, names.BPFFS),
            ("stateDir", state_dir, names.STATE_DIR),
        )
        if str(folder) != default
    }
    found = Entry(options, folders)
    if options:
        _check(options, found.over({}))
    return found


def options_of(argument: str | None) -> dict[str, Any] | None:
    """What ``--conf-json`` says; None when it was not given. Raises as parse_options() does."""
    return None if argument is None else parse_options(argument)


def parse_options(text: str) -> dict[str, Any]:
    """``--conf-json``: a JSON object, or the file that holds one.

    Raises:
        InstallError: it is neither.
        OSError: the file cannot be read.
    """
    if not text:
        raise InstallError("--conf-json is empty; {} takes all options out of our entry")
    source = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
    try:
        return protocol.decode(source.encode())
    except protocol.CniError as error:
        raise InstallError(f"--conf-json is not a JSON object: {error.details}") from error


def _check(options: dict[str, Any], whole: dict[str, Any]) -> None:
    import jsonschema  # noqa: PLC0415 - megabytes that an agent without options does not need

    rules = json.loads(schema.schema_path().read_text(encoding="utf-8"))
    known = rules["properties"].keys() - _NOT_OPTIONS
    wrong = [f"{key}: not an option" for key in sorted(options.keys() - known)]
    conf = {**whole, "name": "any", "cniVersion": names.NEWEST_CNI_VERSION}
    for error in jsonschema.Draft7Validator(rules).iter_errors(conf):
        where = ".".join(map(str, error.absolute_path)) or "configuration"
        wrong.append(f"{where}: {error.message:.200}")
    if not wrong:
        try:
            netconf.refuse_unsupported(conf)
            netconf.parse(conf)
        except protocol.CniError as error:
            wrong.append(str(error))
    if wrong:
        raise InstallError("--conf-json: " + "; ".join(wrong))
