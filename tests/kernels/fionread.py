# SPDX-License-Identifier: Apache-2.0
"""Suite: in random states, does FIONREAD of a bypassed socket say what TCP would?

Each step is made on two connections at once: one bypasses, one stays on TCP, since its ends have
set SO_RCVBUF. After each step both ends of both are asked. Connections are of IPv4 and of IPv6.
The bypass is paused and resumed meanwhile. Before the mend is in place, the kernel is asked alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import multiprocessing
import random
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from bpf import abi, bpfsys, pins
from bpf.loader import Programs
from install.program.probes import ADDRESSES, enter, unread_bytes
from tests.light import LIMITS, LightPod, accelerated, set_nodelay

PAIRS = 6
LIFE = 400  # steps of a pair
SIZES = (1, 1, 10, 100, 1_000, 5_000)
MOST = 16_000  # unread: what any window lets in
PATIENCE_S = 5.0
ON_THE_WAY_S = 1.0
SHOWN = 3
_Fork = multiprocessing.get_context("fork")


@dataclass
class Asked:
    """What came of it."""

    states: int = 0
    wrong: list[str] = field(default_factory=list)
    late: int = 0  # answers that were right when asked again: bytes were on their way

    def compare(self, what: str, ours: socket.socket, plain: socket.socket) -> None:
        """TCP's bytes may be on their way to either; what is there stays until it is read."""
        deadline = time.monotonic() + ON_THE_WAY_S
        self.states += 1
        while (found := unread_bytes(ours)) != (expected := unread_bytes(plain)):
            if time.monotonic() > deadline:
                self.wrong.append(f"{what}: {found} in place of {expected}")
                return
            self.late += 1
            time.sleep(0.0005)


def connected(family: socket.AddressFamily, *, plain: bool) -> list[socket.socket]:
    source, target = ADDRESSES[family]
    with socket.create_server((target, 0), family=family) as listener:
        client = socket.create_connection(listener.getsockname()[:2], PATIENCE_S, (source, 0))
        ends = [client, listener.accept()[0]]
    set_nodelay(*ends)
    for end in ends:
        end.settimeout(PATIENCE_S)
        if plain:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    return ends


class Twins:
    """The same connection twice, and what lies unread at each end."""

    def __init__(self, pod: LightPod, family: socket.AddressFamily) -> None:
        self.family = family.name
        joined = pod.total().joined
        self.ours, self.plain = connected(family, plain=False), connected(family, plain=True)
        self.unread = [0, 0]
        self.open = [True, True]
        self.left = LIFE
        deadline = time.monotonic() + PATIENCE_S
        while pod.total().joined < joined + 2 and time.monotonic() < deadline:
            self.exchange()
        self.exchange()  # the first message after the peer has joined goes by TCP

    def exchange(self) -> None:
        for sender, reader in ((0, 1), (1, 0)):
            self.send(sender, 1)
            self.read(reader, 1, 0)

    def send(self, end: int, size: int) -> None:
        if self.open[end] and self.unread[1 - end] + size <= MOST:
            for pair in (self.ours, self.plain):
                pair[end].sendall(bytes(size))
            self.unread[1 - end] += size

    def read(self, end: int, size: int, flags: int) -> None:
        """The same number of bytes from both, whatever one call returns."""
        size = min(size, self.unread[end])
        for pair in (self.ours, self.plain):
            if flags and size:
                pair[end].recv(size, flags)
            missing = 0 if flags else size
            while missing:
                missing -= len(pair[end].recv(missing))
        self.unread[end] -= 0 if flags else size

    def step(self, draw: random.Random) -> str:
        self.left -= 1
        end, size = draw.randrange(2), draw.choice(SIZES)
        what = draw.choice(("send", "send", "read", "read", "peek"))
        if self.left < LIFE // 10 and draw.random() < 0.1:
            what, self.open[end] = "shut down", False
            for pair in (self.ours, self.plain):
                with contextlib.suppress(OSError):
                    pair[end].shutdown(socket.SHUT_WR)
        elif what == "send":
            self.send(end, size)
        else:
            self.read(end, size, socket.MSG_PEEK if what == "peek" else 0)
        return f"{self.family} {what} {size} at {end}"

    def ask(self, what: str, asked: Asked) -> None:
        for end in (0, 1):
            asked.compare(f"{what}, end {end}", self.ours[end], self.plain[end])

    def close(self) -> None:
        for end in (*self.ours, *self.plain):
            end.close()


def states(pod: LightPod, count: int, draw: random.Random) -> Asked:
    """So many states compared, or fewer once some are wrong."""
    asked, families = Asked(), list(ADDRESSES)
    twins = [Twins(pod, families[index % 2]) for index in range(PAIRS)]
    paused = False
    while asked.states < count and len(asked.wrong) < SHOWN:
        index = draw.randrange(PAIRS)
        if draw.random() < 0.01:
            paused = not paused
            pod.pause(paused)
        if not twins[index].left:
            twins[index].close()
            pod.pause(False)  # else the new one does not join
            twins[index] = Twins(pod, draw.choice(families))
            pod.pause(paused)
        what = twins[index].step(draw)
        twins[index].ask(f"{what}{' (paused)' if paused else ''}", asked)
    for each in twins:
        each.close()
    pod.pause(False)
    return asked


def beside_a_reader(pod: LightPod, count: int) -> dict[str, int]:
    """Asks while another thread reads: how often the answer was more than there can have been."""
    twins = Twins(pod, socket.AF_INET)
    sender, reader = twins.ours
    sent = received = above = 0
    over = threading.Event()

    def read() -> None:
        nonlocal received
        while chunk := reader.recv(700):
            received += len(chunk)
        over.set()

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(count):
        before = received
        sender.sendall(bytes(1000))
        sent += 1000
        above += unread_bytes(reader) > sent - before
    sender.shutdown(socket.SHUT_WR)
    over.wait(PATIENCE_S)
    thread.join()
    twins.close()
    return {"asked": count, "above": above, "missing": sent - received}


# push rbx; mov ebx, edi; mov ecx, esi; mov eax, 54 (ioctl of i386); int 0x80; pop rbx; ret
_COMPAT_IOCTL = bytes.fromhex("5389fb89f1b836000000cd805bc3")


def by_a_32_bit_call(reader: socket.socket) -> int:
    """FIONREAD through the kernel's entry for 32-bit programs, x86-64 only."""
    libc, map_32bit = ctypes.CDLL(None), 0x40
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_32bit
    protection = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    page = libc.mmap(None, 4096, protection, flags, -1, 0)
    ctypes.memmove(page, _COMPAT_IOCTL, len(_COMPAT_IOCTL))
    answer = ctypes.c_int.from_address(page + 2048)
    answer.value = -1
    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_uint, ctypes.c_uint)(page)
    call(reader.fileno(), termios.FIONREAD, page + 2048)
    return answer.value


def compat(pod: LightPod) -> dict[str, Any]:
    """What a 32-bit program is told, by address family; its bypassed bytes, and then TCP's."""
    found = {}
    for family in ADDRESSES:
        twins = Twins(pod, family)
        twins.ours[0].sendall(bytes(321))
        answers = [by_a_32_bit_call(twins.ours[1])]
        twins.ours[1].recv(321)
        pod.pause()
        twins.ours[0].sendall(bytes(123))
        time.sleep(0.05)
        answers.append(by_a_32_bit_call(twins.ours[1]))
        pod.pause(False)
        found[family.name] = answers
        twins.close()
    return found


RIGHT = {family.name: [321, 123] for family in ADDRESSES}  # what compat() should find


def in_pod(work: Callable[[LightPod], Any], pod: LightPod) -> Any:
    """The result of work in a child process that has joined the pod."""
    ours, theirs = _Fork.Pipe()

    def run(result: Connection) -> None:
        enter(pod.folder)
        result.send(work(pod))

    child = _Fork.Process(target=run, args=(theirs,))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        return None
    finally:
        child.join()


def main(count: int) -> int:
    draw = random.Random(count)
    programs = Programs(LIMITS)
    with accelerated(programs) as pod:
        alone = in_pod(compat, pod)
        why_not = programs.mend_fionread() if alone != RIGHT else "the kernel is right"
        start = time.monotonic()
        asked = in_pod(lambda one: states(one, count, draw), pod)
        seconds = time.monotonic() - start
        found = {
            "alone": alone,
            "why_not_mended": why_not,
            "states": asked and asked.states,
            "seconds": round(seconds),
            "late": asked and asked.late,
            "wrong": asked.wrong if asked else ["it did not end"],
            "beside_a_reader": in_pod(lambda one: beside_a_reader(one, count // 20), pod),
            "compat": in_pod(compat, pod),
        }
        total = pod.total()
    found["bypassed"] = total.bypassed_messages
    found["paused"] = total.tcp_messages.get("paused", 0)
    if not why_not:
        raw = bpfsys.map_lookup(programs.fds[pins.FIONREAD], bytes(4), 8)
        found["lost"] = abi.Fionread.from_buffer_copy(raw).lost
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
