# SPDX-License-Identifier: Apache-2.0
"""Mounts a bpffs where programs are pinned, in a mount namespace that outlives the agent.

In a pod that is the node's: a bpffs of the pod's own would go with it, and the plugin, which the
runtime starts outside, would never see it. setns(2) is for processes with one thread, so this
runs as `python -m install.program.agent.bpffs FOLDER [NAMESPACE]`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

from install.program import ROOT, host
from install.program.agent.schedule import NotDone
from install.program.generations import is_bpffs


def mount(bpffs: Path, host_proc: Path) -> bool:
    """Whether a mount was missing below the folder of our pins, and now is there.

    ``host_proc`` is the node's /proc, which is elsewhere when this process is in a pod. Raises
    NotDone.
    """
    if is_bpffs(bpffs):
        return False
    argv = [sys.executable, "-m", __name__, str(bpffs.parent)]
    if host_proc != host.OWN_PROC:
        argv.append(str(host_proc / "1/ns/mnt"))
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not is_bpffs(bpffs):
        why = done.stderr.strip().rpartition("\n")[2] or "the mount does not show in this pod"
        by_hand = f"; on the node: mount -t bpf bpf {bpffs.parent}" if done.returncode else ""
        raise NotDone(f"{bpffs} is not on a bpffs: {why}{by_hand}")
    return True


def main(folder: str, namespace: str | None = None) -> None:
    """Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if namespace:
        host.enter_mounts(Path(namespace))
    if is_bpffs(Path(folder)):
        return
    if any(Path(folder).iterdir()):
        raise OSError(errno.ENOTEMPTY, "a mount would hide what is in it", folder)
    if libc.mount(b"bpf", os.fsencode(folder), b"bpf", 0, b"mode=0700"):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
