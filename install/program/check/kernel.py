# SPDX-License-Identifier: Apache-2.0
"""What of the kernel the bypass stands on. Nothing is attached, loaded for good or written."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from pathlib import Path

from cni_plugin import cgroup
from install.program.check import finding, tracing
from install.program.check.finding import Finding
from install.program.generations import is_bpffs

# bpf_iter/task_file over the files of one process: install/program/selftest.py tries it.
OLDEST = (6, 1)
FOR_THE_MEND = ("lockdown", "tracing")  # of FIONREAD
_BTF = Path("/sys/kernel/btf/vmlinux")
_LOCKDOWN = Path("sys/kernel/security/lockdown")
_CHOSEN = re.compile(r"\[(\w+)\]")


def check(bpffs: Path, host_root: Path, *, before_install: bool) -> Iterator[Finding]:
    """``host_root`` is the node's root folder as this process sees it."""
    yield _version(platform.release())
    yield _btf(_BTF)
    yield _cgroup2()
    yield _bpffs(bpffs, before_install=before_install)
    yield _lockdown(host_root / _LOCKDOWN)
    yield _tracing()


def _version(release: str) -> Finding:
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return finding.broken("kernel", release, f"it takes Linux {wanted} or newer", finding.NEEDS)
    return finding.well("kernel", release, finding.NEEDS)


def _btf(path: Path) -> Finding:
    try:
        size = path.stat().st_size
    except OSError as error:
        hint = "a kernel with CONFIG_DEBUG_INFO_BTF is needed: the members' offsets are read there"
        return finding.broken("btf", f"{path}: {error.strerror}", hint, finding.NEEDS)
    return finding.well("btf", f"{path}, {size / 2**20:.1f} MiB", finding.NEEDS)


def _cgroup2() -> Finding:
    try:
        mount = cgroup.find_mount()
    except OSError as error:
        return finding.broken("cgroup2", str(error), "mount /proc", finding.NEEDS)
    if mount is None:
        hint = "mount one: mount -t cgroup2 none /sys/fs/cgroup/unified; hybrid hierarchies will do"
        return finding.broken("cgroup2", "mounted nowhere", hint, finding.NEEDS)
    return finding.well("cgroup2", str(mount), finding.NEEDS)


def _bpffs(folder: Path, *, before_install: bool) -> Finding:
    if is_bpffs(folder):
        return finding.well("bpffs", str(folder), finding.THE_POD)
    found = f"{folder} is not on a bpffs"
    if before_install:
        return finding.well("bpffs", f"{found}; `load` will mount one", finding.THE_POD)
    hint = f"tcpip-bypass-node load, or by hand: mount -t bpf bpf {folder.parent}"
    return finding.broken("bpffs", found, hint, finding.THE_POD)


def _lockdown(path: Path) -> Finding:
    try:
        chosen = _CHOSEN.search(path.read_text())
    except OSError:
        return finding.well("lockdown", "not to be seen; whether it refuses anything stands below")
    level = chosen[1] if chosen else "none"
    if level == "confidentiality":
        hint = "the programs read kernel memory, which this level forbids; boot with integrity"
        return finding.broken("lockdown", level, hint, finding.KERNEL_TRIED)
    if level == "integrity":
        hint = "FIONREAD cannot be mended: where this kernel gets it wrong, the mode is proxy-only"
        return finding.less("lockdown", level, hint, finding.KERNEL_TRIED)
    return finding.well("lockdown", level)


def _tracing() -> Finding:
    if why_not := tracing.why_not():
        hint = "FIONREAD cannot be mended, nor splice(2) refused: the mode is proxy-only"
        return finding.less("tracing", why_not, hint, finding.KERNEL_TRIED)
    return finding.well("tracing", "a fexit program loads", finding.KERNEL_TRIED)
