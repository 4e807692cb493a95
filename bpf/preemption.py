# SPDX-License-Identifier: Apache-2.0
"""Where this kernel preempts threads, since it leaves a program out while another thread is
preempted inside it on the same CPU (kernel/bpf/trampoline.c: __bpf_prog_enter_recur).

    full             anywhere: too often to rely on such a program
    lazy             as a rule not inside a program, but it happens: a virtual CPU was stopped
    voluntary, none  never inside a program
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

_DEBUGFS = "/sys/kernel/debug"
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000  # linux/sched.h, linux/mount.h
_CHOSEN = re.compile(r"\((\w+)\)")
_COMMAND_LINE, _ASKED = Path("/proc/cmdline"), re.compile(r"\bpreempt=(\w+)")


def model() -> str:
    """One of the above; empty when it cannot be found out."""
    version = os.uname().version
    if "PREEMPT_DYNAMIC" in version:
        chosen = _CHOSEN.search(_read_debugfs("sched/preempt")) or _ASKED.search(
            _COMMAND_LINE.read_text()
        )
        return chosen[1] if chosen else ""
    return "full" if "PREEMPT" in version else "voluntary"


def _read_debugfs(name: str) -> str:
    """A short file of debugfs, which a process of its own mounts for itself; empty without it."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        try:
            libc = ctypes.CDLL(None)
            # One after the other: what is mounted otherwise would be the node's.
            is_alone = not libc.unshare(_CLONE_NEWNS)
            is_alone = is_alone and not libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
            if is_alone and not libc.mount(b"debugfs", _DEBUGFS.encode(), b"debugfs", 0, None):
                os.write(theirs, Path(_DEBUGFS, name).read_bytes())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return text


def is_within_programs(model: str) -> bool:
    """Whether a thread may be preempted inside a program, be it rarely."""
    return model not in ("none", "voluntary")
