# SPDX-License-Identifier: Apache-2.0
"""Whether the node can run a plugin: tried as its runtime would start it, and if not, why not.

That is in the node's mounts and root, not in those of the agent's pod, with nothing in the
environment. A process of its own goes there: `python -m install.program.trial PROGRAM [PROC]`.
It tells its findings from there: only there the node's loader, C library and mount options
show.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

from cni_plugin import names
from install.program import host

_TIMEOUT_S = 60.0
_MORE_S = 20.0  # for Python itself
_CALL = f'{{"cniVersion": "{names.NEWEST_CNI_VERSION}"}}'.encode()
# The node is short of something for a moment; that says nothing of the plugin.
_PASSING = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETXTBSY)
_MISSING_VERSION = re.compile(r"(/\S+): version `GLIBC_([0-9.]+)' not found")
_MISSING_LIBRARY = re.compile(r"loading shared libraries: (\S+): cannot open")
_RELEASE = re.compile(rb"release version ([0-9.]*[0-9])")
_PT_INTERP = 3  # elf.h


class NotTried(Exception):
    """Nothing is known of the plugin; the message says what was in the way."""


def why_not(program: Path, proc: Path) -> str:
    """Why the node cannot run this program; empty when it can.

    ``program`` is what the node calls it, ``proc`` a /proc of its PID namespace; see host. Raises
    NotTried.
    """
    argv = [sys.executable, "-m", __name__, str(program)]
    if proc != host.OWN_PROC:
        argv.append(str(proc))
    try:
        done = subprocess.run(
            argv,
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S + _MORE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotTried(str(error)) from error
    if done.returncode:
        last = _text(done.stderr).rpartition("\n")[2]
        raise NotTried(last or f"the trial ended with {done.returncode}")
    return str(json.loads(done.stdout))


def main(program: str, proc: str | None = None) -> None:
    """Prints the reason as JSON; ends with a traceback when the program could not be tried."""
    if proc is not None:
        host.enter(Path(proc))
    # From here on nothing can be imported: Python's files may not be here.
    print(json.dumps(_try(Path(program))))


def _try(program: Path) -> str:
    try:
        done = subprocess.run(
            [program],
            env={"CNI_COMMAND": "VERSION"},
            input=_CALL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"it does not answer VERSION within {_TIMEOUT_S:.0f} s"
    except OSError as error:
        if error.errno in _PASSING:
            raise
        return _why_not_started(program, error)
    if done.returncode == -signal.SIGKILL:
        raise NotTried("it was killed, perhaps for want of memory")
    if done.returncode:
        return _why_it_failed(done.returncode, _text(done.stderr))
    try:
        if names.NEWEST_CNI_VERSION in json.loads(done.stdout)["supportedVersions"]:
            return ""
    except (ValueError, LookupError, TypeError):
        pass
    return f"it answers VERSION with {_text(done.stdout)!r:.200}"


def _why_not_started(program: Path, error: OSError) -> str:
    if not program.exists():
        return f"there is no {program}"
    if error.errno == errno.ENOENT:
        return (
            f"it asks for {_interpreter(program)}, which the node does not have: the plugin needs "
            "the GNU C library and its loader"
        )
    if error.errno == errno.EACCES and os.statvfs(program).f_flag & os.ST_NOEXEC:
        return f"{program.parent} is on a file system that is mounted noexec"
    return str(error.strerror)


def _why_it_failed(status: int, said: str) -> str:
    if library := _MISSING_LIBRARY.search(said):
        return f"it asks for {library[1]}, which the node does not have"
    missing = _MISSING_VERSION.findall(said)
    if not missing:
        return f"it ends with {status}: {said!r:.200}"
    wanted = max((version for _, version in missing), key=_numbers)
    has = _release(Path(missing[0][0]).with_name("libc.so.6"))
    return f"it asks for glibc {wanted} or newer, and the node has {has or 'an older one'}"


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _release(libc: Path) -> str:
    """The version in the text that the C library prints when it is executed; empty if unknown."""
    try:
        found = _RELEASE.search(libc.read_bytes())
    except OSError:
        return ""
    return found[1].decode() if found else ""


def _interpreter(program: Path) -> str:
    """What the kernel starts in a program's place: a script's first line, or an ELF's PT_INTERP.

    Program headers as elf(5) has them, of 64 bits and this machine's byte order.
    """
    data = program.read_bytes()
    if data.startswith(b"#!"):
        return _text(data[2:].partition(b"\n")[0])
    try:
        (table,) = struct.unpack_from("=Q", data, 32)
        size, count = struct.unpack_from("=HH", data, 54)
        for at in range(table, table + size * count, size):
            kind, _, offset, _, _, length = struct.unpack_from("=IIQQQQ", data, at)
            if kind == _PT_INTERP:
                return _text(data[offset : offset + length].rstrip(b"\0"))
    except struct.error:
        pass
    return "a loader"


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip()


if __name__ == "__main__":
    main(*sys.argv[1:])
