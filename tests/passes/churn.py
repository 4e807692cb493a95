# SPDX-License-Identifier: Apache-2.0
"""Connections that end in every way, under passes back to back that take them in and out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bpf import abi, bpfsys, pins
from tests.bed import ends
from tests.bed.pod import within
from tests.light import LightPod, accelerated

SOURCE = Path(__file__).with_suffix(".c")
PROGRAM = Path(__file__).resolve().parents[2] / "build/passes/churn"
THREADS = 8
FLIP = 16  # passes between two changes of TB_CONTROL_LEAVE
SETTLING_S = 3.0  # the last sockets are freed meanwhile
_COMPLAINT = re.compile(r"WARNING|BUG|refcount|Call Trace|soft lockup|general protection|Oops|hung")


def compiled() -> Path:
    """The program; compiled where there is a compiler, which no guest has."""
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    return ends.compiled(SOURCE, PROGRAM.parent) if shutil.which("gcc") else PROGRAM


@contextmanager
def kernel_complaints() -> Iterator[list[str]]:
    """Fills the list with what the kernel complains of while the context lasts."""
    found: list[str] = []
    kmsg = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(kmsg, 0, os.SEEK_END)
    is_over = threading.Event()

    def read() -> None:
        while True:
            try:
                line = os.read(kmsg, 8192).decode(errors="replace")
            except BlockingIOError:
                if is_over.wait(0.1):
                    return
            except BrokenPipeError:
                found.append("kernel messages were lost")
            else:
                if _COMPLAINT.search(line):
                    found.append(line.partition(";")[2].strip())

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield found
    finally:
        is_over.set()
        reader.join()
        os.close(kmsg)


def sockstat() -> dict[str, int]:
    """TCP's numbers in /proc/net/sockstat: sockets here; allocated, and pages, on the machine."""
    text = Path("/proc/net/sockstat").read_text()
    words = next(line for line in text.splitlines() if line.startswith("TCP:")).split()[1:]
    return {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}


def members(pod: LightPod) -> int:
    return len(list(bpfsys.map_keys(pod.programs.fds[pins.SOCKHASH], 8)))


def main(seconds: float = 60, *arguments: str) -> dict[str, Any]:
    program, before, passes = compiled(), sockstat(), 0
    with kernel_complaints() as problems, accelerated(passes=False) as pod:
        traffic = [str(program), str(THREADS), str(int(seconds)), *arguments]
        command = within(traffic, cgroup=pod.folder)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None:
                if passes % FLIP == 0:
                    pod.control(abi.CONTROL_LEAVE if passes % (2 * FLIP) else 0)
                pod.visit()
                passes += 1
            assert process.stdout
            printed = process.stdout.read()
        pod.control(0)
        time.sleep(SETTLING_S)
        remaining = members(pod)
        total = pod.total()
    if process.returncode:
        problems.append(f"the program ended with {process.returncode}")
    if remaining:
        problems.append(f"{remaining} sockets are in the sockhash at the end")
    if not (total.joined and (total.left or "ktls" in arguments)):
        problems.append("no socket joined and left: nothing was tried")
    return {
        "seconds": seconds,
        "printed": printed.strip(),
        "passes": passes,
        "joined": total.joined,
        "left": total.left,
        "bypassed messages": total.bypassed_messages,
        "sockstat before": before,
        "sockstat after": sockstat(),
        "problems": problems,
    }
