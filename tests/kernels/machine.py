# SPDX-License-Identifier: Apache-2.0
"""One kernel under QEMU, from power-on to the last suite's result."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.kernels.images import Kernel, Qemu
from tests.kernels.suites import PROJECT, Outcome, Suite

_MEMORY = "4096M"
_BOOT_TIMEOUT_S = 120
_LONGEST_RESULT = 64 << 20  # bytes
# An emulated CPU may stand still for seconds when the machine is busy.
_SLOW_CLOCK = "no_timer_check nosoftlockup rcupdate.rcu_cpu_stall_suppress=1"
# Kernel messages that are a finding whatever the suites say.
_COMPLAINT = re.compile(r"WARNING: |BUG: |Oops|general protection|Kernel panic")


@dataclass
class Run:
    """What one kernel did."""

    kernel: Kernel
    outcomes: list[Outcome] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    suites: Sequence[Suite] = ()  # what it was to run
    boot_s: float | None = None
    timed_out: bool = False


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


@dataclass(frozen=True)
class Machine:
    """What all guests have in common. `report` hears of every outcome as it comes."""

    qemu: Qemu
    initramfs: Path
    report: Callable[[Kernel, Outcome], None]

    async def run(self, kernel: Kernel, suites: Sequence[Suite], console: Path) -> Run:
        """Boots `kernel` and runs `suites` on it; its messages go to the file `console`."""
        result = Run(kernel, suites=suites)
        start = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *self._command(kernel, suites, console),
            env=self.qemu.environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            limit=_LONGEST_RESULT,
            preexec_fn=_die_with_parent,
        )
        assert process.stdout
        try:
            async with asyncio.timeout(_BOOT_TIMEOUT_S + sum(suite.timeout_s for suite in suites)):
                async for line in process.stdout:
                    outcome = Outcome(**json.loads(line))
                    if result.boot_s is None:
                        result.boot_s = time.monotonic() - start - outcome.seconds
                    result.outcomes.append(outcome)
                    self.report(kernel, outcome)
                await process.wait()
        except TimeoutError:
            result.timed_out = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        messages = console.read_text(errors="replace").splitlines()
        result.complaints = [line for line in messages if _COMPLAINT.search(line)]
        return result

    def _command(self, kernel: Kernel, suites: Sequence[Suite], console: Path) -> list[str]:
        append = (
            f"console=ttyS0 loglevel=5 panic=-1 oops=panic mitigations=off {_SLOW_CLOCK}"
            f" {kernel.parameters} rdinit={PROJECT}/.venv/bin/python PYTHONPATH={PROJECT}"
            " -- -m tests.kernels.guest " + " ".join(suite.name for suite in suites)
        )
        return [
            *self.qemu.command(),
            *("-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", _MEMORY),
            *("-nodefaults", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{console}"),
            *("-chardev", "stdio,id=results,signal=off", "-serial", "chardev:results"),
            *("-kernel", str(kernel.image), "-initrd", str(self.initramfs), "-append", append),
        ]
