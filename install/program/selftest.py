# SPDX-License-Identifier: Apache-2.0
"""Tries this kernel before it is trusted, and decides what may be switched on.

A version number proves nothing: distributions backport both the bugs and the mends. So the
programs are loaded into a scratch cgroup, and what an application would see over the bypass is
compared with what it sees over plain TCP on the very same kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bpf import abi, bpfsys, pins, stats
from bpf.loader import VISIT, Limits, LoadError, Programs
from cni_plugin import cgroup, names
from install.program import ROOT, lock, passes
from install.program.probes import PROBES

POD_ID = 1
SCRATCH_PREFIX = "tcpip-bypass-selftest-"
TIMEOUT_S = 180  # a probe that hangs ends by its own time-outs; this is for slow machines
LIMITS = Limits(sockets=4096, pending=4096, counters=64, segments=1, exchanges=1, age_ms=0)
ATTEMPTS = 3  # at letting every socket of the probes join
PASSES_S = 0.004

FULL, PROXY_ONLY, OFF = names.MODES

# Without these right, only sidecars may be touched: they never ask for FIONREAD, applications
# such as nginx and Java do, and they read until there is nothing. Without any other, nothing may.
FIONREAD = ("fionread_bypassed", "fionread_tcp", "fionread_ipv6")
SPLICE = "splice"
APPLICATION_ONLY = (*FIONREAD, SPLICE, "edge_behind")

HOPS = {
    FULL: "all three hops bypass TCP/IP",
    PROXY_ONLY: "sidecar to sidecar bypasses TCP/IP; both hops inside a pod stay on TCP",
    OFF: "every hop stays on TCP",
}
PREEMPTED = "with preempt=full the kernel leaves programs out; boot it with preempt=lazy"
_TRACING = "let programs trace the kernel (no lockdown, no Secure Boot)"
# For an operator: a kernel's fault, by the checks that find it, and what to do.
_FAULTS = {
    FIONREAD: "ioctl(FIONREAD) is wrong for sockets in a sockhash, until Linux 7.2; "
    f"to mend it here, {_TRACING}, and no `fionread: leave`",
    (SPLICE,): f"splice(2) does not see bypassed bytes; to refuse it there, {_TRACING}",
    ("edge_behind",): "a reader is not woken for bytes behind bypassed ones; try a newer kernel",
    ("load",): "the programs do not load; Linux 6.1 or newer is needed, with BTF",
}
_OTHER = "sockets in a sockhash do not behave as TCP's do; try a newer kernel"
_LATE = "the self-test ran out of time, perhaps since this node is busy; try again"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    what: str
    expected: str
    found: str
    ok: bool

    @property
    def is_late(self) -> bool:
        """Whether a busy node, and not its kernel, may have made it fail."""
        is_late = self.name == "bypass"  # passes were late each time
        is_late |= self.expected.startswith("failed ")  # already over TCP
        return is_late and not self.ok


@dataclass(frozen=True)
class Verdict:
    """What the node may do, and why not more."""

    mode: str
    reasons: list[str]
    checks: list[Check]
    is_mended: bool = False  # FIONREAD is right only as mended (bpf/data_path/fionread.h)

    @property
    def is_final(self) -> bool:
        """False when the self-test could not be carried through; another time it may be."""
        return not any(check.name == "load" or check.is_late for check in self.checks)

    @property
    def faults(self) -> list[str]:
        """Why the mode is not `full`, and what to do, in an operator's words."""
        late = {check.name for check in self.checks if check.is_late}
        failed = {check.name for check in self.checks if not check.ok} - late
        found = [said for checks, said in _FAULTS.items() if failed & {*checks}]
        known = {name for checks in _FAULTS for name in checks}
        return found + [_OTHER] * bool(failed - known) + [_LATE] * bool(late)

    def as_json(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "hops": HOPS[self.mode],
            "faults": self.faults,
            "reasons": self.reasons,
            "checks": [asdict(check) for check in self.checks],
            "mended": self.is_mended,
        }


def run(*, mends: bool = True) -> Verdict:
    """Runs the whole self-test; takes a few seconds and leaves nothing behind.

    With `mends`, FIONREAD is mended where the kernel has it wrong, as far as the kernel lets it.
    """
    try:
        sweep()
        found = _behaviour(mends)
    except LoadError as error:
        loads = Check("load", "The programs load", "all load", str(error), False)
        return Verdict(OFF, [f"load: {error}"], [loads])
    return replace(decide(found.checks), is_mended=found.is_mended)


def decide(checks: list[Check]) -> Verdict:
    """The mode that the failed checks leave."""
    failed = [check for check in checks if not check.ok]
    reasons = [f"{check.name}: expected {check.expected}, found {check.found}" for check in failed]
    if any(check.name not in APPLICATION_ONLY for check in failed):
        return Verdict(OFF, reasons, checks)
    return Verdict(PROXY_ONLY if failed else FULL, reasons, checks)


@dataclass(frozen=True)
class _Found:
    """What became of the probes, and whether FIONREAD was mended for it."""

    checks: list[Check]
    is_mended: bool


def _behaviour(mends: bool) -> _Found:
    plain = _probe(None)
    why_not = "the configuration says leave"
    with _scratch_cgroup() as folder:
        programs = Programs(LIMITS)
        is_preempted = programs.preemption == "full"
        with _accelerated(programs, folder):
            bypassed, counters = _bypassed(programs, folder)
            is_wrong = any(bypassed[name] != plain[name] for name in FIONREAD)
            if is_wrong and mends:
                why_not = PREEMPTED if is_preempted else programs.mend_fionread()
            if is_wrong and not why_not:
                mended, again = _bypassed(programs, folder, *FIONREAD)
                bypassed |= mended
                counters += again
    checks = [_share(counters), *(compare(name, plain[name], bypassed[name]) for name in PROBES)]
    blind = programs.blind_to_splice or (PREEMPTED if is_preempted else "")
    if blind:  # its socket may have joined too late to be asked
        checks = [replace(each, ok=each.ok and each.name != SPLICE) for each in checks]
    remarks = {SPLICE: f"not seen: {blind}" if blind else ""}
    if is_wrong:
        remarks |= dict.fromkeys(FIONREAD, f"not mended: {why_not}" if why_not else "mended")
    checks = [_remarked(check, remarks.get(check.name, "")) for check in checks]
    return _Found(checks, is_wrong and not why_not)


def _bypassed(
    programs: Programs, folder: Path, *only: str
) -> tuple[dict[str, dict[str, Any]], stats.HopCounters]:
    """What the probes find, once all their sockets have joined that may: on a busy machine a pass
    may come too late, and a probe would try TCP. And what was counted meanwhile."""
    for _ in range(ATTEMPTS):
        before = _counters(programs)
        found = _probe(folder, *only)
        counted = _counters(programs).since(before)
        if counted.joined >= _eligible(counted):
            break
    return found, counted


def _eligible(counted: stats.HopCounters) -> int:
    """How many sockets should have joined: those paired that nothing keeps out."""
    paired, *kept_out = (counted.connections.get(outcome, 0) for outcome in abi.PAIRED)
    return paired - sum(kept_out)


def _share(counted: stats.HopCounters) -> Check:
    """Without it the other checks would say nothing."""
    wanted, size = _eligible(counted), counted.bypassed_bytes
    return Check(
        "bypass",
        "Bytes between two sockets go past TCP/IP",
        f"some, {wanted} sockets",
        f"{size} of {size + counted.tcp_bytes} bytes, {counted.joined} sockets",
        size > 0 and counted.joined >= wanted,
    )


def _remarked(check: Check, remark: str) -> Check:
    """A line with what became of the mend, or of the watch; not where it was right without."""
    if not remark or (check.ok and remark != "mended"):
        return check
    return replace(check, found=f"{check.found} ({remark})")


def compare(name: str, plain: dict[str, Any], bypassed: dict[str, Any]) -> Check:
    """A probe's line: over the bypass it must find what it finds over TCP.

    The one exception is how much a stalled receiver lets its sender queue: up to twice as much.
    """
    expected, ok = plain, plain == bypassed
    if name == "backpressure" and "queued" in plain:
        limit = 2 * plain["queued"]
        expected = {**plain, "queued": f"at most {limit}"}
        ok = bypassed.get("queued", limit + 1) <= limit and {**bypassed, "queued": 0} == {
            **plain,
            "queued": 0,
        }
    what = (PROBES[name].__doc__ or name).rstrip(".")
    return Check(name, what, _text(expected), _text(bypassed), ok and "failed" not in plain)


def _text(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items())


def _probe(folder: Path | None, *only: str) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "install.program.probes", str(folder or ""), *only]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            cwd=ROOT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LoadError(f"the probes took longer than {TIMEOUT_S} s") from error
    if done.returncode:
        raise LoadError(f"the probes could not run: {done.stderr.strip()}")
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def _mount() -> Path:
    mount = cgroup.find_mount()
    if mount is None:
        raise LoadError("no cgroup2 file system is mounted")
    return mount


@contextmanager
def _scratch_cgroup() -> Iterator[Path]:
    """A cgroup of our own, locked as long as we live, so that sweep() can tell it from litter."""
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX, dir=_mount()))
            stack.enter_context(lock.held(folder))
        except OSError as error:
            raise LoadError(f"cannot make a scratch cgroup: {error}") from error
        try:
            yield folder
        finally:
            _remove(folder)


def sweep() -> None:
    """Removes the scratch cgroups of self-tests that were killed, and the programs with them."""
    mount = cgroup.find_mount()
    for folder in mount.glob(f"{SCRATCH_PREFIX}*") if mount else ():
        try:
            with lock.held(folder):
                _remove(folder)
        except OSError:
            continue  # gone, or locked: a self-test that is running


def _remove(folder: Path) -> None:
    """Ends what is left in the cgroup and removes it; raises OSError after 5 s."""
    deadline = time.monotonic() + 5
    while True:
        for pid in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            return folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def _accelerated(programs: Programs, folder: Path) -> Iterator[None]:
    """The programs attached to the cgroup, as ADD would for a pod."""
    cgroup_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with bpfsys.closing(cgroup_fd):
        bpfsys.prog_attach(programs.fds["tb_sock_ops"], cgroup_fd)
        pod = abi.Pod(id=POD_ID, ip_count=1)
        pod.ip[0].word[3] = POD_ID
        key = abi.CgroupStorageKey(folder.stat().st_ino, bpfsys.CGROUP_SOCK_OPS, 0)
        bpfsys.map_update(programs.fds[pins.PODS], bytes(key), bytes(pod))
        try:
            with _passes(programs.fds[VISIT], folder):
                yield
        finally:
            bpfsys.prog_detach(programs.fds["tb_sock_ops"], cgroup_fd)


@contextmanager
def _passes(visit: int, folder: Path) -> Iterator[None]:
    """Passes over the cgroup's processes, one after the other; raises LoadError if refused."""
    try:
        bpfsys.visit_files(visit, os.getpid())
    except OSError as error:
        raise LoadError(
            f"this kernel cannot visit the open files of one process: {error.strerror};"
            " Linux 6.1 is needed"
        ) from error
    with passes.repeated(partial(passes.visit_pod, visit, folder), PASSES_S):
        yield


def _counters(programs: Programs) -> stats.HopCounters:
    def lookup(key: bytes, size: int) -> bytes:
        return bpfsys.map_lookup(programs.fds[pins.COUNTERS], key, size)

    return sum(stats.pod_counters(POD_ID, lookup).values(), stats.HopCounters())
