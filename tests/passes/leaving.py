# SPDX-License-Identifier: Apache-2.0
"""Sockets leave the sockhash and join again under fire: no byte is lost, and no send fails.

Senders are stopped (SIGSTOP) at any moment, and some have a hundredth of a CPU where cgroup2 has
its cpu controller. The verdict is slow: the program waits after it has decided to redirect, as a
sender does that loses its CPU there. A control has the condition on the peer's psock taken out of
tb_try_leave(): it must fail.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bpf import abi
from bpf.loader import VISIT
from cni_plugin import cgroup
from install.program import passes
from tests.light import LIMITS, SERVER_IP, LightPod, accelerated, edited, remove_cgroup

PAIRS = 4
THROTTLED = 1  # of them
ANSWERED = 1_000  # so many bytes get an answer of one
OUTSTANDING = 6  # answers that a sender waits for, at most
PATTERN = bytes(range(251)) * 20
STATE_S = 0.1  # a change of TB_CONTROL_LEAVE waits so long for its leaves, at most
BYPASSED_S = 0.03  # and they bypass so long, at most
LIMIT_S = 600.0
_LAST = "tb_count_bypassed(conn, msg->size, now);\n}"
_WAIT = "for (int i = 0; i < 32768; i++)\n\t\tbpf_ktime_get_ns();\n\t"
_BACK_OFF = "conn->wanted = tb_min(TB_BACK_OFF * conn->wanted, TB_MAX_WANTED);"
_CONDITIONS = "return tb_is_drained(conn) && tb_is_idle(conn) && tb_begun(conn) == begun;"
_Fork = multiprocessing.get_context("fork")


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, old
    return text.replace(old, new)


def slow(text: str) -> str:
    """Waits between verdict and redirect; and a socket that has left may join again at once."""
    return replaced(replaced(text, _LAST, _WAIT + _LAST), _BACK_OFF, "")


def without_condition(text: str) -> str:
    return replaced(slow(text), _CONDITIONS, "return 1;")


def expected(position: int, size: int) -> bytes:
    start = position % 251
    return PATTERN[start : start + size]


def send(sock: socket.socket, is_over: mmap.mmap) -> dict[str, Any]:
    draw = random.Random(os.getpid())
    sent = answered = 0
    while not is_over[0]:
        sent += sock.send(expected(sent, draw.randint(1, 2000)))
        while sent // ANSWERED - answered >= draw.randint(1, OUTSTANDING):
            answer = sock.recv(OUTSTANDING)
            if not answer:
                raise EOFError
            answered += len(answer)
    sock.shutdown(socket.SHUT_WR)
    while sock.recv(4096):
        pass
    return {"sent": sent}


def receive(sock: socket.socket, _: mmap.mmap) -> dict[str, Any]:
    received = wrong = 0
    while data := sock.recv(1 << 16):
        wrong += any(
            data[at : at + 2000] != expected(received + at, len(data[at : at + 2000]))
            for at in range(0, len(data), 2000)
        )
        due = (received + len(data)) // ANSWERED - received // ANSWERED
        received += len(data)
        sock.send(bytes(due))
    sock.shutdown(socket.SHUT_WR)
    return {"received": received, "wrong": wrong}


def play(
    folder: Path,
    part: Callable[[socket.socket, mmap.mmap], dict[str, Any]],
    sock: socket.socket,
    is_over: mmap.mmap,
    line: Connection,
) -> None:
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    sock.settimeout(30)
    try:
        line.send(part(sock, is_over))
    except (OSError, EOFError) as error:
        line.send({"error": f"{part.__name__}: {error!r}"})


@contextmanager
def subgroups(pod: LightPod) -> Iterator[tuple[Path, Path, bool]]:
    """(usual, throttled, whether it is): cgroups below the pod's."""
    usual, throttled = pod.folder / "usual", pod.folder / "throttled"
    usual.mkdir()
    throttled.mkdir()
    is_throttled = False
    root = cgroup.find_mount()
    with contextlib.suppress(OSError):
        for folder in (root, pod.folder):
            if folder:
                (folder / "cgroup.subtree_control").write_text("+cpu")
        (throttled / "cpu.max").write_text("1000 100000")
        is_throttled = True
    try:
        yield usual, throttled, is_throttled
    finally:
        remove_cgroup(usual)
        remove_cgroup(throttled)


def keep_stopping(pids: list[int], is_over: threading.Event) -> None:
    while not is_over.wait(random.random() / 500):
        pid = random.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(random.random() / 500)
            os.kill(pid, signal.SIGCONT)


def visit(pod: LightPod, pids: list[int]) -> None:
    """Three visits of each process, as many as leaving takes, in less time than a verdict."""
    for pid in pids:
        for _ in range(3):
            passes.visit_process(pod.programs.fds[VISIT], pid)


def flip(pod: LightPod, pids: list[int], leaves: int, has_failed: Callable[[], bool]) -> None:
    """Passes; out and in again, until so many sockets have left."""
    end = time.monotonic() + LIMIT_S
    while pod.total().left < leaves and time.monotonic() < end and not has_failed():
        for flags in (0, abi.CONTROL_LEAVE):
            pod.control(flags)
            until = time.monotonic() + STATE_S
            while time.monotonic() < until:
                visit(pod, pids)
                done = pod.members() <= 0 if flags else pod.members() >= 2 * PAIRS
                if done:
                    break
            if not flags:
                time.sleep(random.random() * BYPASSED_S)
    pod.control(0)


def connect_all(
    folders: tuple[Path, Path], is_over: mmap.mmap
) -> tuple[list[multiprocessing.context.ForkProcess], list[int], list[Connection]]:
    """Processes, those of senders, and their lines. Each pair connects within the pod."""
    processes, senders, lines = [], [], []
    for number in range(PAIRS):
        folder = folders[number < THROTTLED]
        with socket.create_server((SERVER_IP, 0)) as listener:
            client = socket.create_connection(listener.getsockname(), timeout=30)
            server = listener.accept()[0]
        server.setblocking(False)
        for part, sock in ((send, client), (receive, server)):
            ours, theirs = _Fork.Pipe(duplex=False)
            home = folder if part is send else folders[0]
            process = _Fork.Process(target=play, args=(home, part, sock, is_over, theirs))
            process.start()
            processes.append(process)
            lines.append(ours)
            if part is send and process.pid:
                senders.append(process.pid)
        client.close()
        server.close()
    return processes, senders, lines


def run(leaves: int, edit: Callable[[str], str]) -> dict[str, Any]:
    is_over, stopped = mmap.mmap(-1, 1), threading.Event()
    began = time.monotonic()
    programs = edited(edit, limits=LIMITS)
    with accelerated(programs, passes=False) as pod, subgroups(pod) as (*folders, throttled):
        usual = folders[0]
        home = Path("/proc/self/cgroup").read_text()
        (usual / "cgroup.procs").write_text(str(os.getpid()))
        try:
            processes, senders, lines = connect_all((usual, folders[1]), is_over)
        finally:
            root = cgroup.find_mount()
            assert root, home
            (root / "cgroup.procs").write_text(str(os.getpid()))
        stopper = threading.Thread(target=keep_stopping, args=(senders, stopped))
        stopper.start()
        pids = [process.pid for process in processes if process.pid]
        try:
            flip(pod, pids, leaves, lambda: any(line.poll() for line in lines))
        finally:
            stopped.set()
            stopper.join()
            is_over[0] = 1
        answers = [line.recv() for line in lines]
        for process in processes:
            process.join()
        total = pod.total()
    sent = sum(answer.get("sent", 0) for answer in answers)
    received = sum(answer.get("received", 0) for answer in answers)
    errors = [answer["error"] for answer in answers if "error" in answer]
    return {
        "joined": total.joined,
        "left": total.left,
        "bypassed messages": total.bypassed_messages,
        "tcp messages": total.tcp_messages,
        "sent": sent,
        "received": received,
        "wrong": sum(answer.get("wrong", 0) for answer in answers),
        "errors": errors,
        "throttled": throttled,
        "seconds": round(time.monotonic() - began),
    }


def has_lost(found: dict[str, Any]) -> bool:
    return bool(found["errors"] or found["wrong"] or found["sent"] != found["received"])


def main(leaves: float = 20_000) -> dict[str, Any]:
    product = run(int(leaves), slow)
    control = run(int(leaves), without_condition)
    problems = []
    if has_lost(product):
        problems.append("bytes were lost, or a send failed")
    if product["left"] < leaves:
        problems.append("too few have left: nothing was tried")
    if not has_lost(control):
        problems.append("the control lost nothing: the test shows nothing")
    return {
        "load": os.getloadavg()[0],
        "product": product,
        "control": control,
        "joined": product["joined"],
        "left": product["left"],
        "problems": problems,
    }
