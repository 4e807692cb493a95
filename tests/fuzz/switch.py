# SPDX-License-Identifier: Apache-2.0
"""One connection in a model of the kernel, around the real programs of bpf/.

The model knows what the kernel does with bytes: a bypass queue that is read before the TCP queue,
and readers that a wake-up reaches or not. What to bypass, when to join and when to leave it never
knows: that the C code says, compiled for this machine (tests/fuzz/host).
"""

from __future__ import annotations

import ctypes
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bpf import abi, loader

HOST = Path(__file__).with_name("host")
WRAP = 2**32
LARGEST = 17 * 32768  # bytes: what one sk_msg holds at most
RCVBUF = 131_072
SNDBUF = 2_629_632  # what a socket begins with on lo
LOOK = 16_384  # TB_LOOK
MESSAGE_COST = 1024  # TB_MESSAGE_COST
STREAM = 256 * 1024  # TB_STREAM
BOUND = RCVBUF + SNDBUF // 2  # tb_bound() of a sidecar, and more than that of an application
STRICT_BOUND = RCVBUF // 4
TICK_NS = 1_000_000
REFRESH_NS = 1_000_000_000
MOST_EXCHANGES = 1000  # that joining may take
OUT, MEMBER, LEAVING = range(3)  # enum tb_membership
ESTABLISHED, FIN_WAIT2, CLOSE_WAIT = 1, 5, 8

_MEANWHILE = ctypes.CFUNCTYPE(None)
Step = Callable[[], object]


@dataclass(frozen=True)
class Rules:
    """The real C as a shared library."""

    library: ctypes.CDLL
    bound: int  # bypassed bytes that lie unread at most, where one thread sends them


def built(
    folder: Path, edit: Callable[[str], str] = lambda source: source, *, strict: bool = False
) -> Rules:
    """The rules from the source as edited; `strict`: for a kernel with has_hard_receive_limit()."""
    numbers = [f"-DTB_STRICT={int(strict)}"]
    library = compiled(folder, "switch.c", edit, numbers)
    return Rules(library, STRICT_BOUND if strict else BOUND)


def compiled(
    folder: Path, host: str, edit: Callable[[str], str], more: Sequence[str]
) -> ctypes.CDLL:
    """A file of tests/fuzz/host around the source as edited; `more` are flags."""
    program = folder / "program.c"
    program.write_text(edit(loader.source_text()))
    library = folder / Path(host).with_suffix(".so")
    limits = [f"-DTB_MAX_{name}=1" for name in ("SOCKETS", "PENDING", "COUNTERS")]
    numbers = [f"-DTB_{name}=1" for name in ("MIN_SEGMENTS", "FIRST_WANTED", "MIN_EXCHANGES")]
    numbers.append("-DTB_MIN_AGE_MS=0ULL")
    warnings = ["-Wall", "-Wno-unused-function", "-Wno-unknown-pragmas"]
    folders = [f"-I{HOST}", f"-I{loader.SOURCE.parent}"]
    source = [f'-DPROGRAM="{program}"', str(HOST / host)]
    output = ["-O0", "-g", "-shared", "-fPIC", "-o", str(library)]
    flags = [*warnings, *folders, *limits, *numbers, *more]
    subprocess.run(["gcc", *output, *flags, *source], check=True)
    return ctypes.CDLL(str(library))


class Broken(AssertionError):
    """What an application must never see has happened."""


class View(ctypes.Structure):
    """struct host_view of tests/fuzz/host/switch.c."""

    _fields_ = [
        (name, ctypes.c_uint32)
        for name in (
            *("write_seq", "rcv_nxt", "copied_seq", "unacked"),
            *("is_owned", "is_asleep", "is_nonblocking", "is_corked", "has_nodelay"),
            *("has_options", "has_ulp"),
            *("state", "inside", "has_unread"),
        )
    ]


@dataclass
class Message:
    """One message on its way, or unread."""

    number: int
    size: int
    left: int  # bytes
    after: frozenset[int]  # unread ones whose sends had ended when this one's began


@dataclass
class End:
    """One end of the connection: an event loop, edge-triggered, that takes a short read for the
    end of what is there."""

    write_seq: int
    copied_seq: int
    is_proxy: bool
    bypass_queue: deque[Message] = field(default_factory=deque)
    tcp_queue: deque[Message] = field(default_factory=deque)
    redirects: deque[Message] = field(default_factory=deque)  # decided on here, not yet queued
    ended: set[int] = field(default_factory=set)  # own messages whose sends have ended, unread
    deciding: int = 0  # threads before their verdict
    said: int = 0  # messages
    heard: int = 0
    sent: int = 0  # messages, since it joined first
    peer_sent: int = 0  # what the peer had sent then, at this end's last message
    run: int = 0  # bytes since the peer last sent, with what messages cost
    went_by_bypass: bool = False  # the last message
    tcp_at: int = 0  # when a message last went by TCP, or it joined
    has_edge: bool = False
    is_ready: bool = False  # as the event loop thinks
    owes_ack: bool = False
    unacked: int = 0  # bytes
    is_asleep: bool = False  # a thread, inside tcp_recvmsg since before it joined
    is_waiting: bool = False  # a thread, inside tcp_bpf_recvmsg
    is_owned: bool = False  # its socket lock
    is_nonblocking: bool = True
    is_corked: bool = False
    has_nodelay: bool = True
    has_options: bool = False
    has_ulp: bool = False
    state: int = ESTABLISHED
    edges_seen: int = 0


class Connection:
    """Two ends. Raises Broken when bytes are lost, come out of order, or are never heard of, and
    when a message is bypassed that must not be."""

    def __init__(
        self,
        rules: Rules,
        isn: tuple[int, int] = (999, 1999),
        proxies: tuple[bool, bool] = (False, False),
        *,
        pods: int = 1,
    ) -> None:
        self.rules, self._bound = rules.library, rules.bound
        two = ctypes.c_uint32 * 2
        self.rules.host_connect(two(*isn), two(*proxies), pods, RCVBUF, SNDBUF)
        self.ends = [End(isn[0], isn[1], bool(proxies[0])), End(isn[1], isn[0], bool(proxies[1]))]
        self.flags = 0
        self.now = TICK_NS
        self._free: int | None = None  # bytes that the kernel can charge the ends' container
        self._is_short = False
        self._broken: list[Exception] = []
        self._steps: list[Step] = []
        self._meanwhile = _MEANWHILE(self._take_steps)

    # ---- The programs, called ----

    def _tell(self) -> None:
        self.rules.host_clock(ctypes.c_uint64(self.now))
        self.rules.host_control(self.flags)
        for number, end in enumerate(self.ends):
            view = View(
                *(end.write_seq, self.ends[1 - number].write_seq, end.copied_seq, end.unacked),
                *(end.is_owned, end.is_asleep or end.is_waiting),
                *(end.is_nonblocking, end.is_corked, end.has_nodelay),
                *(end.has_options, end.has_ulp, end.state),
                end.deciding + len(end.redirects) + end.is_waiting,
                bool(end.bypass_queue),
            )
            self.rules.host_set(number, ctypes.byref(view))

    def _call(self, program: str, number: int, *arguments: int) -> int:
        self.now += TICK_NS
        before = self.is_in_sockhash(number)
        self._tell()
        result = int(getattr(self.rules, program)(number, *arguments))
        self.rules.host_interrupt(0, self._meanwhile)
        if self._broken:
            raise self._broken[0]
        end = self.ends[number]
        now = self.is_in_sockhash(number)
        if before and not now and end.bypass_queue:
            raise Broken(f"{len(end.bypass_queue)} unread messages are thrown away")
        if now and not before:
            end.tcp_at = self.now
        made = int(self.rules.host_edges(number))
        end.has_edge |= made != end.edges_seen
        end.edges_seen = made
        return result

    def membership(self, number: int) -> int:
        """What the programs say of an end; within a visit not yet, or not any more, what is."""
        return int(self.rules.host_membership(number))

    def is_in_sockhash(self, number: int) -> bool:
        """Is it there, as the kernel knows?"""
        return bool(self.rules.host_is_member(number))

    @contextmanager
    def meanwhile(self, look: int, *steps: Step) -> Iterator[None]:
        """Another CPU takes the steps before the next call's `look`-th look at memory."""
        self.interrupt(look, *steps)
        yield
        self.interrupt(0)

    def interrupt(self, look: int, *steps: Step) -> None:
        self._steps = list(steps) if look else []
        self.rules.host_interrupt(look, self._meanwhile)

    def _take_steps(self) -> None:
        steps, self._steps = self._steps, []
        try:
            for step in steps:
                step()
            self._tell()
        except Exception as error:
            self._broken.append(error)

    def visit(self, number: int) -> None:
        self._call("host_visit", number)

    def packet(self, number: int) -> None:
        """An end's TCP sends one."""
        self.ends[number].owes_ack = False
        self.ends[1 - number].unacked = 0
        self._call("host_packet", number)

    def limit_memory(self, *, limit: int, used: int, cached: int, of_pod: bool) -> None:
        """Of both ends' container, or of the pod above it, in MB."""
        self._free = (limit - used + max(cached, 0)) << 20
        pages = [ctypes.c_uint64(mb << 8) for mb in (limit, used, cached)]
        self.rules.host_limit_memory(int(of_pod), *pages)

    def run_short(self) -> None:
        """The kernel's memory for TCP passes its mark."""
        self._is_short = True
        self.rules.host_memory_pressure(1)

    # ---- Sending ----

    def begin(self, sender: int, size: int, meanwhile: Step = lambda: None) -> bool:
        """A thread's message, until it is queued by TCP, or its redirect decided upon: True.

        ``meanwhile`` comes between the verdict and TCP's queue.
        """
        end = self.ends[sender]
        message = self._said(sender, size)
        if self._decide(sender, size):
            end.redirects.append(message)
        else:
            meanwhile()
            self._send_by_tcp(sender, message)
        return end.went_by_bypass

    def _said(self, sender: int, size: int) -> Message:
        """A sender's next message."""
        end = self.ends[sender]
        message = Message(end.said, size, size, frozenset(end.ended))
        end.said += 1
        return message

    def _decide(self, sender: int, size: int) -> bool:
        end = self.ends[sender]
        end.went_by_bypass, went_by_bypass = False, end.went_by_bypass
        if not self.is_in_sockhash(sender):
            return False
        sent = self.ends[1 - sender].sent
        end.run = size + MESSAGE_COST + (end.run if sent == end.peer_sent else 0)
        end.peer_sent = sent
        end.sent += 1
        # With steps in between, there is no one moment to judge it by.
        wrong = set() if self._steps else self._forbidden(sender, went_by_bypass)
        end.deciding += 1
        bypassed = bool(self._call("host_send", sender, size))
        end.deciding -= 1
        if bypassed and wrong:
            raise Broken(f"a message is bypassed: {wrong}")
        end.went_by_bypass = bypassed
        if not bypassed:
            end.tcp_at = self.now
        return bypassed

    def _forbidden(self, sender: int, went_by_bypass: bool) -> set[str]:
        """Why this message must not be bypassed."""
        end, peer = self.ends[sender], self.ends[1 - sender]
        if self._is_short:
            return {"a redirect may fail with ENOMEM"}
        if peer.unacked and not peer.has_nodelay:
            return {"the peer waits for an acknowledgement"}
        if peer.bypass_queue:
            return set()
        wrong = {
            "the peer is leaving": self.membership(1 - sender) == LEAVING,
        }
        if not end.deciding and not end.redirects:  # else it waits for another thread's
            wrong |= {
                "the peer has set options": peer.has_options and not went_by_bypass,
                "paused": self.flags != 0,
                "half-closed": ESTABLISHED not in (end.state, peer.state)
                or end.state != peer.state,
                "the peer may sleep in recv": not peer.is_nonblocking,
                "the lock": peer.is_owned and not peer.is_proxy,
                "corked": end.is_corked,
                "kTLS": end.has_ulp or peer.has_ulp,
                "a stream": end.run > STREAM,
                "conntrack": self.now - end.tcp_at > REFRESH_NS + TICK_NS
                and (end.has_nodelay or not end.bypass_queue),
            }
        return {reason for reason, holds in wrong.items() if holds}

    def _send_by_tcp(self, sender: int, message: Message) -> None:
        end, peer = self.ends[sender], self.ends[1 - sender]
        end.write_seq = (end.write_seq + message.size) % WRAP
        end.unacked += message.size
        peer.tcp_queue.append(message)
        end.ended.add(message.number)
        peer.has_edge = peer.owes_ack = True
        if peer.is_asleep:
            peer.is_asleep = False
            self._take(1 - sender, peer.tcp_queue, message.size)
        self.packet(sender)

    def arrive(self, sender: int) -> None:
        """The kernel queues a redirect."""
        end, peer = self.ends[sender], self.ends[1 - sender]
        message = end.redirects.popleft()
        if not self.is_in_sockhash(1 - sender):
            raise Broken("a redirect arrives at a socket that has left: bytes are lost")
        if peer.is_asleep:
            raise Broken("a message is bypassed, its reader sleeps on the TCP queue")
        peer.bypass_queue.append(message)
        peer.has_edge = True
        end.ended.add(message.number)
        unread = sum(each.left for each in peer.bypass_queue)
        if unread > self._bound and not end.redirects:
            raise Broken(f"{unread} bypassed bytes lie unread")
        if self._free is not None and unread > max(self._free, LOOK):
            raise Broken("the kernel kills a process of the reader's container")

    def send(self, sender: int, size: int) -> bool:
        """One message, delivered at once; says whether it went by bypass."""
        bypassed = self.begin(sender, size)
        while self.ends[sender].redirects:
            self.arrive(sender)
        return bypassed

    def end_of_an_earlier_send(self, sender: int, size: int) -> None:
        """By a thread that has been inside send since before the socket joined."""
        self._send_by_tcp(sender, self._said(sender, size))

    # ---- Reading ----

    def read(self, reader: int, size: int) -> int:
        """What the event loop reads at once, if it thinks that there is anything."""
        end = self.ends[reader]
        if end.has_edge:
            end.has_edge, end.is_ready = False, True
        if not end.is_ready or end.is_asleep:
            return 0
        got = self._take(reader, end.bypass_queue or end.tcp_queue, size)
        # After the peer's FIN it goes on to the end of the stream (EPOLLRDHUP).
        end.is_ready = got == size or (got > 0 and end.state == CLOSE_WAIT)
        return got

    def read_everything(self, reader: int) -> None:
        while self.read(reader, 2**20):
            pass

    def _take(self, reader: int, queue: deque[Message], size: int) -> int:
        end, peer = self.ends[reader], self.ends[1 - reader]
        taken = 0
        while queue and taken < size:
            message = queue[0]
            early = message.after & peer.ended
            if early:
                raise Broken(f"message {message.number} is read before {sorted(early)}")
            part = min(message.left, size - taken)
            message.left -= part
            taken += part
            if not message.left:
                queue.popleft()
                peer.ended.discard(message.number)
                end.heard += 1
        if queue is end.tcp_queue:
            end.copied_seq = (end.copied_seq + taken) % WRAP
        return taken

    # ---- The end of it ----

    def settle(self) -> None:
        """Threads go on, timers fire, readers read: until nothing happens any more.

        Raises Broken if a reader has not heard everything by then.
        """
        for number, end in enumerate(self.ends):
            while end.redirects:
                self.arrive(number)
        for _ in range(3):
            for number, end in enumerate(self.ends):
                end.is_asleep = end.is_owned = False
                self.read_everything(number)
                if end.owes_ack:
                    self.packet(number)
                if self.rules.host_begin_pass(number):  # of a pod that both may be in
                    self.visit(0)
                    self.visit(1)
                self.read_everything(number)
        for number, end in enumerate(self.ends):
            missed = self.ends[1 - number].said - end.heard
            if missed:
                raise Broken(f"a reader never hears of {missed} messages")
            if (self.membership(number) != OUT) != self.is_in_sockhash(number):
                raise Broken("the programs and the kernel disagree on a membership")

    def part(self) -> None:
        """Both leave and go on by TCP. Raises Broken if they cannot, or an option stays changed."""
        self.settle()
        self.flags = abi.CONTROL_LEAVE
        for _ in range(4):
            for number in range(2):
                self.visit(number)
        if any(self.membership(number) != OUT for number in range(2)):
            raise Broken("a socket does not leave")
        self.settle()

    def join(self) -> None:
        """Both, after some exchanges: more each time."""
        for _ in range(MOST_EXCHANGES):
            for sender in (0, 1, 0, 1, 0):
                self.send(sender, 1)
                self.read_everything(1 - sender)
            self.packet(1)
            for number in range(2):
                self.visit(number)
                self.rules.host_begin_pass(number)
            if all(self.membership(number) == MEMBER for number in range(2)):
                break
        assert [self.membership(number) for number in range(2)] == [MEMBER, MEMBER]
        for sender in (0, 1):  # the first message after the peer has joined goes by TCP
            self.send(sender, 1)
            self.read_everything(1 - sender)
