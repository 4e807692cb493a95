# SPDX-License-Identifier: Apache-2.0
"""A generation is removed while a reader rests with bytes of both kinds unread."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from bpf.loader import Programs
from cni_plugin import cgroup
from install.program import leaving
from install.program.generations import Generations
from install.program.lock import FolderLock
from install.program.passes import OWN_CGROUP, repeated
from install.program.probes import PART, heard_by_edges
from tests.bed import open_bed
from tests.bed.bed import REPOSITORY
from tests.fuzz.cases import Ends, edges_of
from tests.integration.traffic_pods import eventually
from tests.light import LIMITS, LightPod, accelerated

STAY_BEHIND = """
import sys
from contextlib import nullcontext
from pathlib import Path
from install.program import leaving
from install.program.generations import Generation
from install.program.lock import FolderLock
generation, pod, state = map(Path, sys.argv[1:])
lock = FolderLock(state)  # as the agent has it that is removed
assert lock.take()
leaving.stay_behind(Generation(generation), [pod], nullcontext)
"""
MESSAGE = 8_000  # bytes, no multiple of PART


def rest(pod: LightPod, ready: int, go: int) -> bool:
    """Sends until bytes go by TCP behind others, and reads once told to. Was each byte heard?"""
    ends = Ends(pod)
    edges = edges_of(ends.server)
    sent = 0
    while "backlog" not in pod.total().tcp_messages:
        sent += ends.client.send(bytes(MESSAGE))
    edges.poll()  # its edge is taken
    os.write(ready, b"!")
    os.read(go, 1)
    heard = got = len(ends.server.recv(PART))
    while got == PART:
        got = len(ends.server.recv(PART))
        heard += got
    return heard < sent and heard + heard_by_edges(edges, ends.server, sent - heard) == sent


def left_behind(of: str) -> set[str]:
    """Processes for passes, with this in their command line."""
    mount = cgroup.find_mount()
    assert mount is not None
    found = set()
    with suppress(FileNotFoundError):  # there is none
        for pid in (mount / OWN_CGROUP / "cgroup.procs").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if of in Path(f"/proc/{pid}/cmdline").read_text():
                    found.add(pid)
    return found


@dataclass(frozen=True)
class Resting:
    """A process in the pod at rest(): the file descriptors by which it says so, and goes on."""

    child: int
    ready: int
    going: int

    def is_ready(self) -> bool:
        return bool(select.select([self.ready], [], [], 20)[0])

    def hears_all(self) -> bool:
        os.write(self.going, b"!")
        _, status = os.waitpid(self.child, 0)
        return os.waitstatus_to_exitcode(status) == 0


@contextmanager
def resting(pod: LightPod) -> Iterator[Resting]:
    (ready, is_ready), (go, going) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            pod.enter()
            os._exit(0 if rest(pod, is_ready, go) else 1)
        finally:
            os._exit(2)
    try:
        yield Resting(child, ready, going)
    finally:
        with suppress(ProcessLookupError, ChildProcessError):  # it has ended
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for fd in (ready, is_ready, go, going):
            os.close(fd)


@pytest.mark.parametrize(
    ("number", "has_successor"),
    [(signal.SIGTERM, False), (signal.SIGKILL, False), (signal.SIGTERM, True)],
)
def test_a_reader_that_rests_outlives_the_joiner(
    number: signal.Signals, *, has_successor: bool
) -> None:
    """As while the DaemonSet is updated. What stands in ends when there is another joiner."""
    with open_bed(bypass=False) as bed, closing(Programs(LIMITS)) as programs:  # without a joiner
        folder = str(bed.node.bpffs)
        Generations(bed.node.bpffs).publish(programs)
        with accelerated(programs, passes=False) as pod, resting(pod) as reader:
            with bed.node.joining() as joiner:
                assert reader.is_ready()
                joiner.send_signal(number)
                joiner.wait()
            standing_in = left_behind(folder)
            assert standing_in
            with bed.node.joining() if has_successor else nullcontext():
                assert not has_successor or eventually(
                    lambda: not standing_in & left_behind(folder)
                )
                assert reader.hears_all()
    assert eventually(lambda: not left_behind(folder))


def test_a_reader_that_rests_outlives_the_pins(tmp_path: Path) -> None:
    """The caller's output ends with the caller, and so do its locks."""
    with open_bed() as bed, closing(Programs(LIMITS)) as programs:
        generation = Generations(bed.node.bpffs).publish(programs)
        with accelerated(programs, passes=False) as pod, resting(pod) as reader:
            with repeated(pod.visit, 0.004):
                assert reader.is_ready()
            assert not leaving.take_out_sockets(generation, [pod.folder], patience_s=0.3)
            # In a process that has not used grpc, as `unload` is.
            folders = [generation.folder, pod.folder, tmp_path]
            argv = [sys.executable, "-c", STAY_BEHIND, *map(str, folders)]
            subprocess.run(argv, cwd=REPOSITORY, check=True, capture_output=True, timeout=20)
            assert FolderLock(tmp_path).take()
            generation.remove()
            assert left_behind(str(generation.folder))
            assert reader.hears_all()
    assert eventually(lambda: not left_behind(str(generation.folder)))
