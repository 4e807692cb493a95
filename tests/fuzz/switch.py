"""One connection in a model of the kernel, around the real rules of bpf/tcpip_bypass.c.

The model knows what the kernel does with bytes: a bypass queue that is read before the TCP queue,
and readers that, once inside tcp_recvmsg, see the TCP queue only. What it never knows is when to
bypass: that the C code says, compiled for this machine (tests/fuzz/host).
"""

from __future__ import annotations

import ctypes
import subprocess
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bpf.loader import SOURCE

HOST = Path(__file__).with_name("host")
WRAP = 2**32
LARGEST = 17 * 32768  # bytes: what one sk_msg holds at most
RCVBUF = 131_072
OVERDUE = 512 * 1024  # TB_MAX_OVERDUE


def built(folder: Path, edit: Callable[[str], str] = lambda source: source) -> ctypes.CDLL:
    """The rules as a shared library, from the source as edited."""
    program = folder / "program.c"
    program.write_text(edit(SOURCE.read_text()))
    library = folder / "switch.so"
    limits = [f"-DTB_MAX_{name}=1" for name in ("SOCKETS", "PENDING", "COUNTERS")]
    warnings = ["-Wall", "-Wno-unused-function", "-Wno-unknown-pragmas"]
    folders = [f"-I{HOST}", f"-I{SOURCE.parent}"]
    source = [f'-DPROGRAM="{program}"', str(HOST / "switch.c")]
    output = ["-O1", "-g", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run(["gcc", *output, *warnings, *folders, *limits, *source], check=True)
    return ctypes.CDLL(str(library))


class Broken(AssertionError):
    """What an application must never see has happened."""


@dataclass
class End:
    """One end of the connection. Messages are numbered by the order in which they were sent."""

    write_seq: int
    copied_seq: int
    said: int = 0  # messages
    heard: int = 0
    bypass_queue: deque[tuple[int, int]] = field(default_factory=deque)  # (message, bytes left)
    tcp_queue: deque[tuple[int, int]] = field(default_factory=deque)
    wants: int = 0  # a reader is asleep inside tcp_recvmsg until it has so many bytes more
    polling: bool = False  # a thread is asleep in poll
    lowat: int = 1
    locked: bool = False  # its socket lock is held
    others_inside: int = 0  # threads in send or recv, besides the one that sends now


class Connection:
    """Two ends; raises Broken when bytes come out of order or a reader sleeps through them."""

    def __init__(
        self, rules: ctypes.CDLL, isn: tuple[int, int], proxies: tuple[bool, bool]
    ) -> None:
        self._rules = rules
        two = ctypes.c_uint32 * 2
        rules.host_connect(two(*isn), two(*proxies), RCVBUF)
        self.ends = [End(isn[0], isn[1]), End(isn[1], isn[0])]
        self.paused = False

    def _tell(self) -> None:
        for number, end in enumerate(self.ends):
            self._rules.host_set(
                number,
                *(ctypes.c_uint32(end.write_seq), ctypes.c_uint32(end.copied_seq)),
                *(end.lowat, int(end.locked), 2 + end.others_inside),
                *(int(bool(end.wants) or end.polling), int(not end.bypass_queue)),
            )

    def pause(self, paused: bool) -> None:
        self.paused = paused
        self._rules.host_pause(int(paused))

    def send(self, sender: int, size: int, thread: int = 1) -> bool:
        """One message, delivered at once; says whether it went by bypass."""
        end, peer = self.ends[sender], self.ends[1 - sender]
        self._tell()
        bypassed = bool(self._rules.host_send(sender, size, ctypes.c_uint64(thread)))
        message = end.said
        end.said += 1
        if bypassed:
            if peer.tcp_queue:
                raise Broken(f"message {message} is bypassed, {len(peer.tcp_queue)} lie unread")
            if peer.wants:
                raise Broken(f"message {message} is bypassed, its reader sleeps on the TCP queue")
            peer.bypass_queue.append((message, size))
            unread = sum(left for _, left in peer.bypass_queue)
            if unread > RCVBUF + OVERDUE + 2 * LARGEST:
                raise Broken(f"{unread} bypassed bytes lie unread")
        else:
            end.write_seq = (end.write_seq + size) % WRAP
            peer.tcp_queue.append((message, size))
            if peer.wants:
                peer.wants -= self._take(peer, peer.tcp_queue, peer.wants)
        return bypassed

    def send_by_tcp(self, sender: int, total: int, unread: int) -> None:
        """Many messages while the bypass is paused, all but the last bytes read at once.

        `unread` says how many of the last bytes stay unread.
        """
        before = self.paused
        self.pause(True)
        step = LARGEST
        while total > 0:
            size = min(step, total - unread if total > unread else unread)
            self.send(sender, size)
            total -= size
            if total >= unread > 0 or not unread:
                self.read(1 - sender, size)
        self.pause(before)

    def read(self, reader: int, size: int, *, wait_for_all: bool = False) -> int:
        """recv(2), not blocking unless it waits for all; how many bytes it got at once."""
        end = self.ends[reader]
        if end.wants:
            return 0  # somebody is in there already
        if end.bypass_queue:
            return self._take(end, end.bypass_queue, size)
        if not end.tcp_queue:
            return 0  # blocks in tcp_bpf_recvmsg, for both queues: no danger
        got = self._take(end, end.tcp_queue, size)
        if wait_for_all and got < size:
            end.wants = size - got
        return got

    def _take(self, end: End, queue: deque[tuple[int, int]], size: int) -> int:
        taken = 0
        while queue and taken < size:
            message, left = queue.popleft()
            if message != end.heard:
                raise Broken(f"message {message} is read where {end.heard} must come")
            part = min(left, size - taken)
            taken += part
            if part < left:
                queue.appendleft((message, left - part))
            else:
                end.heard += 1
        if queue is end.tcp_queue:
            end.copied_seq = (end.copied_seq + taken) % WRAP
        return taken
