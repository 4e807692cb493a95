# SPDX-License-Identifier: Apache-2.0
"""Whether the node can run a plugin: tried as its runtime would start it, and if not, why not.

That is in the node's mounts and root, not in those of the agent's pod, with nothing in the
environment. A process of its own goes there: `python -m install.program.trial PROGRAM [PROC]`.
It tells its findings from there, since only there the node's mount options show.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from cni_plugin import names
from install.program import ROOT, host

_TIMEOUT_S = 60.0
_MORE_S = 20.0  # for Python itself
_CALL = f'{{"cniVersion": "{names.NEWEST_CNI_VERSION}"}}'.encode()
# The node is short of something for a moment; that says nothing of the plugin.
_PASSING = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETXTBSY)


_KILLED = "it was killed, perhaps for want of memory"  # cni_plugin/start.c says so, too


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
            cwd=ROOT,
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
        raise NotTried(_KILLED)
    if done.returncode:
        return f"it ends with {done.returncode}: {_text(done.stderr or done.stdout)!r:.200}"
    if _KILLED.encode() in done.stderr:
        raise NotTried(_KILLED)
    if done.stderr:  # start.c has answered in the plugin's place
        return f"it does not start: {_text(done.stderr).splitlines()[0]!r:.200}"
    try:
        if names.NEWEST_CNI_VERSION in json.loads(done.stdout)["supportedVersions"]:
            return ""
    except (ValueError, LookupError, TypeError):
        pass
    return f"it answers VERSION with {_text(done.stdout)!r:.200}"


def _why_not_started(program: Path, error: OSError) -> str:
    if not program.exists():
        return f"there is no {program}"
    if error.errno == errno.EACCES and os.statvfs(program).f_flag & os.ST_NOEXEC:
        return f"{program.parent} is on a file system that is mounted noexec"
    return str(error.strerror)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace").strip()


if __name__ == "__main__":
    main(*sys.argv[1:])
