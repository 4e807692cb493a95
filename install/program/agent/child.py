# SPDX-License-Identifier: Apache-2.0
"""Runs a command of the node program as a child: what it needs of memory goes with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from install.program import ROOT, log
from install.program.agent.schedule import NotDone

_LOOK_S = 1.0


def run(
    arguments: list[str], timeout_s: float, stop: Callable[[], bool], meanwhile: Callable[[], None]
) -> str:
    """What the command printed. Its log becomes part of ours when it has ended.

    ``stop`` says whether it is to be broken off; that and ``meanwhile`` are called every second.

    Raises:
        NotDone: it failed; the message is the last thing it said.
    """
    out, said = os.memfd_create("stdout"), os.memfd_create("stderr")
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "install.program.cli", *arguments, "--log-format", "json"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=said,
            cwd=ROOT,
        ) as child:
            how = _wait(child, timeout_s, stop, meanwhile)
        message = _relay(_read(said))
        if child.returncode == 0:
            return _read(out)
        command = f"tcpip-bypass-node {arguments[0]}"
        raise NotDone(message if child.returncode == 1 else f"{command} {how}: {message}")
    finally:
        os.close(out)
        os.close(said)


def _wait(
    child: subprocess.Popen[bytes],
    timeout_s: float,
    stop: Callable[[], bool],
    meanwhile: Callable[[], None],
) -> str:
    """Until it has ended, or was told to; how it did."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            status = child.wait(_LOOK_S)
            is_killed = status == -signal.SIGKILL
            hint = " (for want of memory? `resources.limits.memory`)" if is_killed else ""
            return f"ended with {status}{hint}"
        except subprocess.TimeoutExpired:
            meanwhile()
        if stop():
            child.terminate()
            return "was broken off"
    child.kill()
    return f"took longer than {timeout_s:.0f} s and was ended"


def _relay(text: str) -> str:
    """Says it again; returns the last message."""
    message = ""
    for line in text.splitlines():
        try:
            message = log.again(json.loads(line))
        except (ValueError, TypeError, AttributeError, KeyError):  # a library's, or a traceback
            message = line
            log.warning("child_output", line)
    return message


def _read(fd: int) -> str:
    return os.pread(fd, os.fstat(fd).st_size, 0).decode("utf-8", "replace")
