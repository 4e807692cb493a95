# SPDX-License-Identifier: Apache-2.0
"""One connection in a model of the kernel, around the real rules of bpf/tcpip_bypass.c.

The model knows what the kernel does with bytes: a bypass queue that is read before the TCP queue,
and readers that, once inside tcp_recvmsg, see the TCP queue only. What it never knows is when to
bypass: that the C code says, compiled for this machine (tests/fuzz/host).
"""

from __future__ import annotations

import ctypes
import os
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
SNDBUF = 2_629_632  # what a socket begins with on lo
LOOK = 16_384  # TB_LOOK
MESSAGE_COST = 1024  # TB_MESSAGE_COST
OVERDUE = 512 * 1024  # TB_MAX_OVERDUE
SHORT_OVERDUE = 64 * 1024  # TB_SHORT_OVERDUE
# What makes an end's small writes gather, see host_connect().
NOTHING, PACING, NAGLE, WINDOW = range(4)
BOUND = RCVBUF + SNDBUF // 2  # tb_bound() of a sidecar, and more than that of an application


@dataclass(frozen=True)
class Kernel:
    """What kernels differ in, see bpf/loader.py: is_strict()."""

    strict: bool = False

    @property
    def flags(self) -> list[str]:
        return [f"-DTB_STRICT={int(self.strict)}"]

    @property
    def bounded(self) -> int:
        """Bypassed bytes that lie unread at most, where one thread sends them."""
        return RCVBUF // 4 + SHORT_OVERDUE // 2 if self.strict else BOUND + OVERDUE + LARGEST


@dataclass(frozen=True)
class Rules:
    """The real C as a shared library, for kernels of one kind."""

    library: ctypes.CDLL
    kernel: Kernel


NEWEST, STRICT = Kernel(), Kernel(strict=True)


def built(
    folder: Path, kernel: Kernel, edit: Callable[[str], str] = lambda source: source
) -> Rules:
    """The rules from the source as edited, for such kernels."""
    program = folder / "program.c"
    program.write_text(edit(SOURCE.read_text()))
    library = folder / "switch.so"
    flags = [*kernel.flags, *(f"-DTB_MAX_{name}=1" for name in ("SOCKETS", "PENDING", "COUNTERS"))]
    warnings = ["-Wall", "-Wno-unused-function", "-Wno-unknown-pragmas"]
    folders = [f"-I{HOST}", f"-I{SOURCE.parent}"]
    source = [f'-DPROGRAM="{program}"', str(HOST / "switch.c")]
    output = ["-O1", "-g", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run(["gcc", *output, *warnings, *folders, *flags, *source], check=True)
    return Rules(ctypes.CDLL(str(library)), kernel)


class Broken(AssertionError):
    """What an application must never see has happened."""


@dataclass
class End:
    """One end of the connection. Messages are numbered by the order in which they were sent."""

    write_seq: int
    copied_seq: int
    nonblocking: bool = False
    said: int = 0  # messages
    heard: int = 0
    bypass_queue: deque[tuple[int, int]] = field(default_factory=deque)  # (message, bytes left)
    tcp_queue: deque[tuple[int, int]] = field(default_factory=deque)
    wants: int = 0  # a reader is asleep inside tcp_recvmsg until it has so many bytes more
    polling: bool = False  # a thread is asleep in poll
    lowat: int = 1
    locked: bool = False  # its socket lock is held
    others_inside: int = 0  # threads in send or recv, besides the one that sends now
    on_its_way: int | None = None  # size of a redirect by another thread: decided, not yet queued
    left: bool = False  # the sockhash: plain TCP from here on
    has_taken: bool = False  # a byte, so that it is accepted and does not peek for the first
    shut: bool = False  # it has sent its FIN
    encrypted: bool = False  # it has got kTLS
    accepted: bool = True  # by the application, which can do nothing with it before


class Connection:
    """Two ends; raises Broken when bytes come out of order or a reader sleeps through them."""

    def __init__(
        self,
        rules: Rules,
        isn: tuple[int, int],
        proxies: tuple[bool, bool],
        nonblocking: tuple[bool, bool],
        gathers: tuple[int, int] = (PACING, PACING),
    ) -> None:
        self._rules = rules.library
        two = ctypes.c_uint32 * 2
        flags = (os.O_NONBLOCK if each else 0 for each in nonblocking)
        ends = two(*isn), two(*proxies), two(*flags), two(*gathers)
        self._rules.host_connect(*ends, RCVBUF, SNDBUF)
        self.ends = [
            End(isn[0], isn[1], nonblocking=nonblocking[0]),
            End(isn[1], isn[0], nonblocking=nonblocking[1]),
        ]
        self.paused = False
        self.addresses = 1  # that messages get in turn, as they are freed and made
        self.bounded = rules.kernel.bounded

    def _tell(self, sender: int | None = None) -> None:
        for number, end in enumerate(self.ends):
            self._rules.host_set(
                number,
                *(ctypes.c_uint32(end.write_seq), ctypes.c_uint32(end.copied_seq)),
                # The sender of the moment holds its psock as well; see send().
                *(end.lowat, int(end.locked), 1 + end.others_inside + (number == sender)),
                *(int(bool(end.wants) or end.polling), self._oldest(end)),
            )

    def _oldest(self, end: End) -> int:
        """Where the head of the bypass queue lies: 1 or 2, 0 for an empty one."""
        if not end.bypass_queue:
            return 0
        return 1 + end.bypass_queue[0][0] // 2 % self.addresses

    def declared(self, number: int) -> int:
        """The sequence number up to which an end last said that it has read everything."""
        return int(self._rules.host_mark(number)) & (WRAP - 1)

    def pause(self, paused: bool) -> None:
        self.paused = paused
        self._rules.host_pause(int(paused))

    def press_for_memory(self, pressed: bool) -> None:
        self._rules.host_memory_pressure(int(pressed))

    def limit_memory(self, *, limit: int, used: int, cached: int = 0, pods: bool = False) -> None:
        """Of both ends' container, or of the pod above it, in MB."""
        pages = [ctypes.c_uint64(mb << 8) for mb in (limit, used, cached)]
        self._rules.host_limit_memory(int(pods), *pages)

    def send(self, sender: int, size: int, thread: int = 1) -> bool:
        """One message, delivered at once; says whether it went by bypass."""
        end, peer = self.ends[sender], self.ends[1 - sender]
        self._tell(sender)
        bypassed = not end.left and self._asked(sender, size, thread)
        message = end.said
        end.said += 1
        if bypassed:
            if peer.tcp_queue:
                raise Broken(f"message {message} is bypassed, {len(peer.tcp_queue)} lie unread")
            if peer.wants:
                raise Broken(f"message {message} is bypassed, its reader sleeps on the TCP queue")
            peer.bypass_queue.append((message, size))
            unread = sum(left for _, left in peer.bypass_queue)
            if unread > self.bounded:
                raise Broken(f"{unread} bypassed bytes lie unread")
        else:
            end.write_seq = (end.write_seq + size) % WRAP
            peer.tcp_queue.append((message, size))
            if peer.wants:
                peer.wants -= self._take(peer, peer.tcp_queue, peer.wants)
        return bypassed

    def _asked(self, sender: int, size: int, thread: int) -> bool:
        bypassed = bool(self._rules.host_send(sender, size, ctypes.c_uint64(thread)))
        if bypassed and self.ends[1 - sender].left:
            raise Broken("a redirect to a socket that has left the sockhash: the send fails")
        if bypassed and not self.ends[1 - sender].has_taken:
            raise Broken("a redirect to an application that has not taken a byte: it may peek")
        if bypassed and any(end.encrypted for end in self.ends):
            raise Broken("a redirect past kTLS")
        if bypassed and self._is_half_closed() and not self.ends[1 - sender].bypass_queue:
            raise Broken("a redirect while conntrack forgets the connection")
        return bypassed

    def start_redirect(self, sender: int, size: int, thread: int) -> bool:
        """One thread's message, decided upon; arrive() queues it. Says whether it is a redirect."""
        end = self.ends[sender]
        self._tell(sender)
        if end.left or not self._asked(sender, size, thread):
            return False
        end.others_inside += 1
        end.on_its_way = size
        return True

    def arrive(self, sender: int) -> None:
        """The kernel queues the message of start_redirect()."""
        end, peer = self.ends[sender], self.ends[1 - sender]
        assert end.on_its_way is not None
        if peer.left:
            raise Broken(
                "a redirect arrives at a socket that has left the sockhash: bytes are lost"
            )
        peer.bypass_queue.append((end.said, end.on_its_way))
        end.said += 1
        end.others_inside -= 1
        end.on_its_way = None

    def make_nonblocking(self, number: int) -> None:
        """fcntl(O_NONBLOCK), also while a thread sleeps in recv."""
        self.ends[number].nonblocking = True
        self._rules.host_make_nonblocking(number)

    def set_rcvbuf(self, number: int, size: int) -> None:
        """setsockopt(SO_RCVBUF), which keeps it from growing."""
        self._rules.host_set_rcvbuf(number, size)

    def accept(self, number: int, *, accepted: bool = True) -> None:
        """accept(2), which gives an end its file; or it is still to come."""
        self.ends[number].accepted = accepted
        self._rules.host_accept(number, int(accepted))

    def offer(self, number: int, window: int) -> None:
        """TCP has told the peer that it takes so many bytes."""
        self._rules.host_offer(number, window)

    def shut(self, number: int) -> None:
        """shutdown(SHUT_WR), and the peer has got the FIN."""
        self.ends[number].shut = True
        self._rules.host_shut(number)

    def _is_half_closed(self) -> bool:
        return any(end.shut for end in self.ends)

    def encrypt(self, number: int) -> None:
        """An end gets kTLS."""
        self.ends[number].encrypted = True
        self._rules.host_encrypt(number)

    def acknowledge(self, speaker: int, times: int = 1) -> bool:
        """The peer's TCP acknowledges bytes; says whether the speaker has left the sockhash."""
        for _ in range(times):
            self._tell()
            self._rules.host_transmits(1 - speaker)
            self._look_who_left(1 - speaker)
            self._tell()
            self._rules.host_acknowledged(speaker)
            self._look_who_left(speaker)
        return self.ends[speaker].left

    def _look_who_left(self, number: int) -> None:
        end = self.ends[number]
        if end.left or self._rules.host_is_in_sockhash(number):
            return
        end.left = True
        if end.bypass_queue:
            raise Broken(f"{len(end.bypass_queue)} unread messages are thrown away")

    def is_called(self) -> bool:
        """Whether the programs are still to be called for packets of either end."""
        return any(self._rules.host_is_called(number) for number in range(len(self.ends)))

    def greet(self) -> None:
        """Two bytes to and fro, one by TCP: from here on either direction may bypass."""
        for sender in (0, 1, 0, 1):
            self.send(sender, 1)
            self.read_everything(1 - sender)

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
        if end.wants or not end.accepted:
            return 0  # somebody is in there already, or nobody can be
        if end.bypass_queue:
            return self._take(end, end.bypass_queue, size)
        if not end.tcp_queue:
            return 0  # blocks in tcp_bpf_recvmsg, for both queues: no danger
        got = self._take(end, end.tcp_queue, size)
        if wait_for_all and got < size and not end.nonblocking:
            end.wants = size - got
        return got

    def read_everything(self, reader: int) -> None:
        """recv(2) until there is nothing more."""
        while self.read(reader, 2**30):
            pass

    def _take(self, end: End, queue: deque[tuple[int, int]], size: int) -> int:
        taken = 0
        while queue and taken < size:
            message, left = queue.popleft()
            if message != end.heard:
                raise Broken(f"message {message} is read where {end.heard} must come")
            part = min(left, size - taken)
            end.has_taken = True
            taken += part
            if part < left:
                queue.appendleft((message, left - part))
            else:
                end.heard += 1
        if queue is end.tcp_queue:
            end.copied_seq = (end.copied_seq + taken) % WRAP
        return taken
