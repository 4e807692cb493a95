# SPDX-License-Identifier: Apache-2.0
"""Process 1 of the guest: makes it a machine, runs the suites named as arguments, switches it off.

Kernel messages go to the first serial port, results to the second: a JSON object per line, an
Outcome for each suite.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
import tty
from pathlib import Path

from tests.kernels.suites import SUITES, Outcome, Suite

RESULTS = "/dev/ttyS1"
_MOUNTS = (
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("securityfs", "/sys/kernel/security"),
    ("devtmpfs", "/dev"),
    ("devpts", "/dev/pts"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/run"),
    ("tmpfs", "/tmp"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("bpf", "/sys/fs/bpf"),
)
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
_SYS_FINIT_MODULE = 313  # x86_64
_STDERR_CHARACTERS = 20_000
_FILES = 1 << 16

_libc = ctypes.CDLL(None, use_errno=True)


def mount(kind: str, target: str) -> None:
    """mount(2) of a file system that has no device."""
    Path(target).mkdir(parents=True, exist_ok=True)
    if _libc.mount(kind.encode(), target.encode(), kind.encode(), 0, None):
        error = ctypes.get_errno()
        raise OSError(error, f"cannot mount {kind}: {os.strerror(error)}", target)


def bring_up_loopback() -> None:
    siocsifflags, iff_up = 0x8914, 1  # linux/sockios.h, linux/if.h
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, siocsifflags, struct.pack("16sH14x", b"lo", iff_up))


def check_lockdown() -> None:
    """Raises RuntimeError if the command line asks for it and the kernel does not have it."""
    if "lockdown=integrity" not in Path("/proc/cmdline").read_text().split():
        return
    level = Path("/sys/kernel/security/lockdown").read_text()
    if "[integrity]" not in level:
        raise RuntimeError(f"this kernel is not locked down: {level}")


def load_modules() -> None:
    """Those that tests/kernels/modules.py has put in order for this kernel."""
    for path in sorted(Path("/lib/modules", os.uname().release).glob("*.ko")):
        with path.open("rb") as file:
            if _libc.syscall(_SYS_FINIT_MODULE, file.fileno(), b"", 0):
                error = ctypes.get_errno()
                raise OSError(error, f"cannot load: {os.strerror(error)}", str(path))


def run(suite: Suite) -> Outcome:
    """Runs one suite; nothing that it started outlives it."""
    start = time.monotonic()
    process = subprocess.Popen(
        suite.command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, **_ENVIRONMENT, **suite.environment},
    )
    exit_code: int | None
    try:
        stdout, stderr = process.communicate(timeout=suite.timeout_s)
        exit_code = process.returncode
        _kill_everything()
    except subprocess.TimeoutExpired:
        _kill_everything()
        stdout, stderr = process.communicate()
        exit_code = None
    seconds = time.monotonic() - start
    return Outcome(suite.name, exit_code, seconds, stdout, stderr[-_STDERR_CHARACTERS:])


def _kill_everything() -> None:
    """Every process but this one, which is the first."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)


def main() -> None:
    for kind, target in _MOUNTS:
        mount(kind, target)
    check_lockdown()
    bring_up_loopback()
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES, _FILES))  # as container runtimes have it
    load_modules()
    results = os.open(RESULTS, os.O_WRONLY | os.O_NOCTTY)
    tty.setraw(results)

    with os.fdopen(results, "w") as port:
        for name in sys.argv[1:]:
            print(json.dumps(dataclasses.asdict(run(SUITES[name]))), file=port, flush=True)
    rb_autoboot = 0x1234567  # linux/reboot.h; QEMU takes it as the end (-no-reboot)
    os.sync()
    _libc.reboot(rb_autoboot)


if __name__ == "__main__":
    main()
