# SPDX-License-Identifier: Apache-2.0
"""Passes: visits to the open files of a pod's processes, in which its sockets join or leave.

A visit takes and drops a reference to each open file, as lsof does. When the process closes a file
at that very moment, the visitor closes it: in rare cases (a network file system, SO_LINGER) that
can take long. So passes run in a process of their own, which may be left behind.

The visit names the files whose readers are to get a new edge: bpf/data_path/edge.h.

To take in a pod's open connections is done there, too: it waits for the lock of each socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bpf import abi, bpfsys
from cni_plugin import cgroup, names
from install.program import lock, log, lookups, whole_file

PATIENCE_S = 1.0  # a pass that takes longer is left to itself, and its pod left out meanwhile
MOST_VISITS = 4  # of a process in one pass: leaving takes three
BETWEEN_VISITS_S = 0.0002
OWN_CGROUP = "tcpip-bypass-passes"  # at the root of cgroup2
PIDFD_THREAD = os.O_EXCL  # Linux 6.9
_END = b"end"


def visit_pod(visit: int, folder: Path) -> None:
    """One pass over the processes below a cgroup.

    ``visit`` is the program, by its file descriptor. Raises OSError when the kernel refuses it;
    BlockingIOError while another process runs a pass over the same pod, since two visits to one
    socket at once would write the same memory.
    """
    with lock.held(folder / "cgroup.procs"):
        left, failures = list(_processes(folder)), list[OSError]()
        for _ in range(MOST_VISITS):
            left = [pid for pid in left if _visit_or_note(visit, pid, failures)]
            if not left:
                break
            time.sleep(BETWEEN_VISITS_S)
    if failures:
        raise failures[0]


def _visit_or_note(visit: int, pid: int, failures: list[OSError]) -> bool:
    """visit_process(); one that fails does not keep the others from theirs."""
    try:
        return visit_process(visit, pid)
    except OSError as error:
        failures.append(error)
        return False


def visit_process(visit: int, pid: int) -> bool:
    """One process of a pass, and the new edges that it asks for; raises as visit_pod() does.

    Returns whether it has a socket that may take its next step on its way out.
    """
    try:
        written = bpfsys.visit_files(visit, pid)
    except ProcessLookupError:  # it has just ended
        return False
    readers, sockets, is_again = parsed(written)
    for fd in dict.fromkeys(readers):
        _wake(pid, fd)
    if sockets:
        try:
            process = _process_with_files(pid)
        except (ProcessLookupError, FileNotFoundError):
            return is_again
        with bpfsys.closing(process):
            is_again |= lookups.visit(process, sockets, partial(_wake, pid))
    return is_again


def _wake(pid: int, fd: int) -> None:
    with contextlib.suppress(OSError):  # closed meanwhile, or the process has ended
        wake_reader(pid, fd)


def parsed(written: bytes) -> tuple[list[int], list[abi.Found], bool]:
    """What a visit has written.

    Returns three things: numbers of files whose readers need a new edge; sockets that are yet to be
    visited; and whether a visited one may take its next step.
    """
    size = ctypes.sizeof(abi.Found)
    words = memoryview(written).cast("I")
    fds, found, is_again, at = list[int](), list[abi.Found](), False, 0
    while at < len(words):
        if words[at] == abi.LOOK_UP:
            found.append(abi.Found.from_buffer_copy(written, 4 * at))
            at += size // 4
            continue
        if words[at] == abi.VISIT_AGAIN:
            is_again = True
        elif words[at] != abi.NO_FILE:
            fds.append(words[at])
        at += 1
    return fds, found, is_again


def take_in(program: int, folder: Path) -> int:
    """Let the open connections of a pod, by its cgroup, be paired; returns how many ends it has.

    ``program`` is a file descriptor. None before Linux 6.12. Raises OSError.
    """
    with taking_in(program, folder):
        return sum(take_in_process(pid) for pid in _processes(folder))


@contextlib.contextmanager
def taking_in(program: int, folder: Path) -> Iterator[None]:
    """Meanwhile sockets of this cgroup have the option abi.TAKE_IN."""
    with (
        bpfsys.closing(os.open(folder, os.O_RDONLY | os.O_DIRECTORY)) as opened,
        bpfsys.closing(bpfsys.link_setsockopt(program, opened)),
    ):
        yield


def take_in_process(pid: int) -> int:
    """Those of one process. Sockets that cannot be taken in refuse the option."""
    taken = 0
    with (
        contextlib.suppress(OSError),  # it has ended
        bpfsys.closing(os.pidfd_open(pid)) as process,
    ):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed, or no such connection
                if str(fd.readlink()).startswith("socket:"):
                    with _copied(process, int(fd.name)) as copy:
                        copy.setsockopt(socket.IPPROTO_TCP, abi.TAKE_IN, 0)
                    taken += 1
    return taken


def wake_reader(pid: int, fd: int) -> None:
    """Give a socket's reader a new edge: SO_RCVLOWAT's own value, written back, runs the kernel's
    tcp_data_ready() (tcp_set_rcvlowat).

    ``fd`` is the socket's number in process ``pid``. Raises OSError, PermissionError where the
    kernel does not let this process have another's files (pidfd_getfd(2)).
    """
    with bpfsys.closing(_process_with_files(pid)) as process, _copied(process, fd) as reader:
        # A member has 1. With another the number is by now that of a socket which sets its own.
        if reader.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT) == 1:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def _process_with_files(pid: int) -> int:
    """A pidfd of a process; of another thread if the first one has ended. Raises OSError."""
    if not Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].startswith(b"Z"):
        return os.pidfd_open(pid)
    threads = [int(each.name) for each in Path(f"/proc/{pid}/task").iterdir()]
    return os.pidfd_open(next((each for each in threads if each != pid), pid), PIDFD_THREAD)


def _copied(process: int, fd: int) -> socket.socket:
    """Another process's socket, by its pidfd, to be closed; raises as wake_reader() does."""
    copy = lookups.copied(process, fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:  # the number is another file's by now
        os.close(copy)
        raise


def _processes(folder: Path) -> Iterator[int]:
    """Those in a cgroup and in the ones below it. Path.glob() took a quarter of a pass
    more."""
    left = [os.fspath(folder)]
    while left:
        cgroup_path = left.pop()
        with contextlib.suppress(OSError):  # the cgroup has gone, or is a threaded one
            with os.scandir(cgroup_path) as entries:
                left += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
            with open(f"{cgroup_path}/cgroup.procs", "rb") as procs:  # noqa: PTH123 - for speed
                yield from (int(pid) for pid in procs.read().split() if pid != b"0")


@contextlib.contextmanager
def repeated(
    visit: Callable[[], object], pause_s: float, *ignored: type[OSError]
) -> Iterator[None]:
    """Visits by a thread of this process meanwhile, `pause_s` apart, over `ignored` errors."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(pause_s):
            with contextlib.suppress(*ignored):
                visit()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@dataclass(frozen=True)
class Passes:
    """What the joiner has done since it began, as it leaves it in the state folder."""

    passes: int = 0
    cpu_ns: int = 0
    failed: int = 0
    hung: int = 0  # passes that were left to themselves and have not ended

    @staticmethod
    def read(state_dir: Path) -> Passes:
        """Zeros when no joiner has run, or its file cannot be read."""
        try:
            return Passes(**json.loads((state_dir / names.JOINER_JSON).read_bytes()))
        except (OSError, ValueError, TypeError):
            return Passes()

    def write(self, state_dir: Path) -> None:
        with contextlib.suppress(OSError):  # a full disk is no reason not to join
            whole_file.write(state_dir / names.JOINER_JSON, json.dumps(asdict(self)))


class PassTimeout(Exception):
    """A pass has taken too long and was left to itself.

    cost_ns: the CPU time of such a pass that has ended since; no new one has begun.
    """

    def __init__(self, message: str, cost_ns: int = 0) -> None:
        super().__init__(message)
        self.cost_ns = cost_ns


@dataclass
class Runner:
    """Runs passes one by one in a process of its own, and another one when that does not answer.

    The process is in a cgroup of its own: what becomes of it does not keep the agent's pod from
    ending. It must be in the host's PID namespace, whose numbers cgroups show (hostPID).

    stand_in: what that process does when this one has ended without close().
    """

    stand_in: Callable[[], object] = lambda: None
    _worker: _Worker | None = None
    _hung: dict[str, _Worker] = field(default_factory=dict)  # by the pod's folder

    def prepare(self) -> None:
        """Starts its process, which can stand in from now on; raises OSError."""
        if self._worker is None or self._worker.has_ended():
            self._worker = _Worker.start(self.stand_in)

    def run(self, visit: int, folder: Path) -> int:
        """One pass; returns the CPU time that it took, in nanoseconds.

        Raises PassTimeout, also while an earlier one over this pod has not ended and once when it
        has, and OSError if the kernel refuses.
        """
        return int(self._ask(visit, {"pod": str(folder)})["cost_ns"])

    def take_in(self, program: int, folder: Path) -> int:
        """See take_in(); raises as run() does."""
        return int(self._ask(program, {"new_pod": str(folder)})["taken_in"])

    def _ask(self, program: int, what: dict[str, str]) -> dict[str, Any]:
        """`what` is a pod's folder, under the name of what is asked for."""
        [path] = what.values()
        self._look_at_hung(path)
        self.prepare()
        worker, self._worker = self._worker, None
        assert worker is not None
        try:
            answer = worker.ask(program, what)
        except PassTimeout:
            self._hung[path] = worker
            worker.end()
            with contextlib.suppress(OSError):
                self.prepare()
            raise
        except (OSError, EOFError):
            worker.end()
            raise
        self._worker = worker
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), path)
        return answer

    def _look_at_hung(self, path: str) -> None:
        worker = self._hung.get(path)
        if worker is None:
            return
        if not worker.has_ended():
            raise PassTimeout(f"an earlier pass over {path} has not ended")
        del self._hung[path]
        cost_ns = worker.late_cost_ns()
        worker.line.close()
        raise PassTimeout(f"a pass over {path} took {cost_ns / 1e9:.1f} s of CPU time", cost_ns)

    def count_hung(self) -> int:
        """How many passes were left to themselves and have not ended. Forgets those of pods that
        have gone; else the next pass asks what it has cost."""
        for path in [each for each in self._hung if not Path(each).exists()]:
            if self._hung[path].has_ended():
                self._hung.pop(path).line.close()
        return sum(not worker.has_ended() for worker in self._hung.values())

    def hand_over(self) -> None:
        """Its process stands in from now on; raises OSError if there is none."""
        self.prepare()
        assert self._worker is not None
        self._worker.line.close()
        self._worker = None

    def close(self) -> None:
        """Its process has ended, or is at a pass that takes long."""
        if self._worker is not None:
            self._worker.end()
            self._worker.wait()
            self._worker = None


@dataclass(frozen=True)
class _Worker:
    """The process, from outside."""

    pid: int
    line: socket.socket

    @staticmethod
    def start(stand_in: Callable[[], object]) -> _Worker:
        """Forks twice, so that its end need not be waited for."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        child = os.fork()
        if not child:
            try:
                ours.close()
                leave_container()
                pid = os.fork()
                if not pid:
                    _serve(theirs, stand_in)
                theirs.send(str(pid).encode())
            finally:
                os._exit(0)
        theirs.close()
        os.waitpid(child, 0)
        first = ours.recv(64)
        if not first:
            raise OSError("the process for passes could not be started")
        return _Worker(int(first), ours)

    def ask(self, program: int, what: dict[str, str]) -> dict[str, Any]:
        """What _answered() has found, or an errno. Raises PassTimeout, OSError, EOFError."""
        socket.send_fds(self.line, [json.dumps(what).encode()], [program])
        if not select.select([self.line], [], [], PATIENCE_S)[0]:
            [path] = what.values()
            raise PassTimeout(f"a pass over {path} takes longer than {PATIENCE_S:.0f} s")
        answer = self.line.recv(4096)
        if not answer:
            raise EOFError("the process for passes has ended")
        found: dict[str, Any] = json.loads(answer)
        return found

    def late_cost_ns(self) -> int:
        """What a pass took that ended after its time; 0 when its process was killed."""
        with contextlib.suppress(OSError, ValueError):
            return int(json.loads(self.line.recv(4096)).get("cost_ns", 0))
        return 0

    def has_ended(self) -> bool:
        """Its end of the line is closed with the process."""
        poller = select.poll()
        poller.register(self.line, 0)
        return bool(poller.poll(0))

    def wait(self) -> None:
        """Until it has ended, for a second at most."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.has_ended() and time.monotonic() < deadline:
            time.sleep(0.001)

    def end(self) -> None:
        """It ends when it next reads its line."""
        with contextlib.suppress(OSError):
            self.line.send(_END)
            self.line.shutdown(socket.SHUT_WR)


def leave_container() -> None:
    """Into a cgroup of its own, so that the container can end before this process does."""
    mount = cgroup.find_mount()
    if mount is None:
        return
    own = mount / OWN_CGROUP
    for _ in range(3):  # another process may remove it between the two
        with contextlib.suppress(OSError):
            own.mkdir(exist_ok=True)
            (own / "cgroup.procs").write_text(str(os.getpid()))
            return


def remove_cgroup(*, is_within: bool = False) -> None:
    """Unless a process is left in it; one that is within goes to the root first, and ends soon."""
    mount = cgroup.find_mount()
    if mount is not None:
        with contextlib.suppress(OSError):
            if is_within:
                (mount / "cgroup.procs").write_text(str(os.getpid()))
            (mount / OWN_CGROUP).rmdir()


def detach(*kept: int) -> None:
    """Closes all files but these: locks among them, and what a caller of this program reads.

    Not in a process that has used grpc: its threads, which a fork starts anew, need theirs.
    """
    gc.freeze()  # nothing of before closes a number that is used again
    log.forget()
    os.setsid()
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _mute()
    for fd in [int(each.name) for each in Path("/proc/self/fd").iterdir()]:
        if fd > 2 and fd not in kept:
            with contextlib.suppress(OSError):  # the listing's own
                os.close(fd)


def _mute() -> None:
    """A caller that reads our output must not wait for a process that lives on."""
    devnull = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(devnull, fd)
    os.close(devnull)


def _answered(program: int, *, pod: str = "", new_pod: str = "") -> dict[str, int]:
    """What the worker was asked: a pass over a pod, or to take one in. Raises OSError."""
    if new_pod:
        return {"taken_in": take_in(program, Path(new_pod))}
    began = time.process_time_ns()
    visit_pod(program, Path(pod))
    return {"cost_ns": time.process_time_ns() - began}


def _serve(line: socket.socket, stand_in: Callable[[], object]) -> None:
    """The worker: answers until it is told to end, or its line is closed. Never returns."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _mute()
    try:
        while True:
            try:
                request, fds, _, _ = socket.recv_fds(line, 65_536, 1)
            except ConnectionResetError:  # ended before it read an answer
                break
            if request == _END:
                return
            if not fds:
                break
            try:
                with bpfsys.closing(fds[0]) as program:
                    answer = _answered(program, **json.loads(request))
            except OSError as error:
                answer = {"errno": error.errno or 5}
            with contextlib.suppress(BrokenPipeError):  # the next look finds the line closed
                line.send(json.dumps(answer).encode())
        stand_in()
    finally:
        os._exit(0)
