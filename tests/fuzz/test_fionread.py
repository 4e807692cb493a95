# SPDX-License-Identifier: Apache-2.0
"""The C that answers FIONREAD, compiled for this machine: a right sum, whatever happens meanwhile.

Another thread reads, messages are freed and their memory is used again, packets and a FIN come in:
at any look of the program at the kernel's memory. What it answers was true at one moment, or the
kernel's own answer stands. A FIN that TCP is at for long may count as a byte.
"""

from __future__ import annotations

import ctypes
import re
import termios
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpf import abi
from tests.fuzz.switch import compiled

OWN = -7  # stands for the kernel's own answer
WRAPS = 2**32 - 1000
NEWER = "-DOFF_PSOCK_MSG_TOT_LEN=offsetof(struct psock, msg_tot_len)"
_MEANWHILE = ctypes.CFUNCTYPE(None)

# What may happen: to do, and how many bytes; and, as another thread does it, after how many looks.
STEPS = st.tuples(
    st.sampled_from(["queue", "queue", "read bypassed", "receive", "read tcp", "fin", "fin"]),
    st.integers(1, 3000),
)
MEANWHILE = st.lists(st.tuples(st.integers(1, 30), STEPS), max_size=6)


@dataclass(frozen=True)
class Mend:
    """The C as a shared library, for kernels that leave out bypassed bytes, or (newer) TCP's."""

    library: ctypes.CDLL
    is_newer: bool


@dataclass
class Socket:
    """A member, and what an application could read from it."""

    library: ctypes.CDLL
    bypassed: int = 0
    by_tcp: int = 0
    fin: int = 0  # 1: counted in rcv_nxt, 2: known
    messages: int = 0
    true: list[int] = field(default_factory=list)  # answers, one after the other
    with_fin: list[int] = field(default_factory=list)  # while TCP is at a FIN

    def __post_init__(self) -> None:
        self.library.host_reset(WRAPS)
        self.true.append(0)

    def do(self, what: str, size: int) -> None:
        if what == "queue" and self.messages < 60:
            self.messages += 1
            self.library.host_queue(size)
            self.bypassed += size
        elif what == "read bypassed" and self.bypassed:
            size = min(size, self.bypassed)
            self.library.host_read_bypassed(size)
            self.bypassed -= size
        elif what == "receive" and not self.fin:
            self.library.host_receive(size)
            self.by_tcp += size
        elif what == "read tcp" and self.by_tcp:
            size = min(size, self.by_tcp)
            self.library.host_read_tcp(size)
            self.by_tcp -= size
        elif what == "fin":
            self._fin()
        self.true.append(self.bypassed + self.by_tcp)
        if self.fin == 1:
            self.with_fin.append(self.true[-1] + 1)

    def _fin(self) -> None:
        """Under the spinlock, in two steps."""
        if not self.fin:
            self.library.host_lock(1)
            self.library.host_receive(1)
        elif self.fin == 1:
            self.library.host_end_stream()
            self.library.host_lock(0)
        self.fin = min(self.fin + 1, 2)

    def ask(self, *meanwhile: tuple[int, tuple[str, int]]) -> tuple[int, list[int]]:
        """The answer, and all that were true while it was made."""
        del self.true[:-1]
        left = list(meanwhile)

        def happen() -> None:
            self.do(*left.pop(0)[1])
            if left:
                self.library.host_interrupt(left[0][0], step)

        step = _MEANWHILE(happen)
        self.library.host_interrupt(left[0][0] if left else 0, step)
        answer = int(self.library.host_ioctl(termios.FIONREAD, OWN, 0))
        self.library.host_interrupt(0, step)
        return answer, self.true


@pytest.fixture(scope="module", params=["older", "newer"])
def mend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mend:
    """For either kind of kernel."""
    return _built(tmp_path_factory.mktemp("host"), is_newer=request.param == "newer")


def _built(folder: Path, *, is_newer: bool, edit: Callable[[str], str] = lambda text: text) -> Mend:
    flags = ["-DTB_STRICT=0", *([NEWER] if is_newer else [])]
    return Mend(compiled(folder, "fionread.c", edit, flags), is_newer)


def expected(sock: Socket, mend: Mend) -> int:
    """Of a socket that is left in peace: where the kernel is right, its answer stands."""
    missing = sock.by_tcp if mend.is_newer else sock.bypassed
    return sock.true[-1] if missing else OWN


@settings(max_examples=1000, deadline=None)
@given(steps=st.lists(STEPS, max_size=20))
def test_the_sum(mend: Mend, steps: list[tuple[str, int]]) -> None:
    sock = Socket(mend.library)
    for what, size in steps:
        sock.do(what, size)
    if sock.fin == 1:
        assert sock.ask()[0] in (OWN, sock.with_fin[-1])
        sock.do("fin", 0)
    assert sock.ask()[0] == expected(sock, mend)


def check_beside(
    mend: Mend,
    before: list[tuple[str, int]],
    meanwhile: list[tuple[int, tuple[str, int]]],
) -> None:
    sock = Socket(mend.library)
    for what, size in before:
        sock.do(what, size)
    answer, true = sock.ask(*meanwhile)
    assert answer == OWN or answer in true + sock.with_fin, (answer, true)


@settings(max_examples=2000, deadline=None)
@given(before=st.lists(STEPS, max_size=10), meanwhile=MEANWHILE)
def test_beside_others(
    mend: Mend,
    before: list[tuple[str, int]],
    meanwhile: list[tuple[int, tuple[str, int]]],
) -> None:
    check_beside(mend, before, meanwhile)


def test_a_fin_counts_only_if_it_takes_long(mend: Mend) -> None:
    for before in range(1, 12):
        for during in range(1, 60):
            sock = Socket(mend.library)
            for what in ("receive", "queue"):
                sock.do(what, 100)
            answer, true = sock.ask((before, ("fin", 0)), (during, ("fin", 0)))
            assert answer in true, (before, during)


def test_a_spinlock_that_is_held(mend: Mend) -> None:
    """By a packet without bytes: the kernel's own answer may be 0, and its reader never wakes."""
    sock = Socket(mend.library)
    for what in ("receive", "queue"):
        sock.do(what, 100)
    mend.library.host_lock(1)
    assert sock.ask()[0] == 200


def test_without_the_second_look_it_would_be_wrong(tmp_path: Path) -> None:
    def blind(text: str) -> str:
        edited, count = re.subn(
            r"if \(first\.received != second.*?size\)\n", "if (0)\n", text, flags=re.DOTALL
        )
        assert count == 1
        return edited

    mend = _built(tmp_path, is_newer=False, edit=blind)
    before = [("queue", 100), ("queue", 200)]

    def check_all() -> None:
        for looks in range(1, 40):
            check_beside(mend, before, [(looks, ("read bypassed", 150))])

    with pytest.raises(AssertionError):
        check_all()


def test_a_reader_that_never_rests_leaves_the_kernels_answer(mend: Mend) -> None:
    sock = Socket(mend.library)
    for what in ("receive", *["queue"] * 4):
        sock.do(what, 1000)
    step = [("read tcp", 1), ("read bypassed", 1)]
    answer, _ = sock.ask(*[(7, step[index % 2]) for index in range(100)])
    assert answer == OWN


@pytest.mark.parametrize("is_inline", [False, True])
def test_up_to_an_urgent_byte(mend: Mend, is_inline: bool) -> None:
    sock = Socket(mend.library)
    sock.do("receive", 500)
    sock.do("queue", 70)
    mend.library.host_urgent((WRAPS + 300) % 2**32, int(is_inline))
    assert sock.ask()[0] == 70 + (500 if is_inline else 300)


def test_of_no_other_socket_and_no_other_ioctl(mend: Mend) -> None:
    sock = Socket(mend.library)
    sock.do("receive", 500)
    sock.do("queue", 70)
    assert mend.library.host_ioctl(termios.FIONREAD, OWN, 0) == 570
    assert mend.library.host_ioctl(termios.TIOCOUTQ, OWN, 0) == OWN
    assert mend.library.host_ioctl(termios.FIONREAD, OWN, -22) == OWN
    mend.library.host_occupy()
    assert mend.library.host_ioctl(termios.FIONREAD, OWN, 0) == OWN
    mend.library.host_leave()
    mend.library.host_forget()
    assert mend.library.host_ioctl(termios.FIONREAD, OWN, 0) == OWN


def test_of_sockets_that_have_just_left_or_join(mend: Mend) -> None:
    """The kernel's answer may be of a moment before, or after."""
    sock = Socket(mend.library)
    sock.do("receive", 500)
    mend.library.host_leave()
    answer = 500 if mend.is_newer else OWN
    assert mend.library.host_ioctl(termios.FIONREAD, OWN, 0) == answer
    mend.library.host_occupy()
    mend.library.host_join()
    assert mend.library.host_ioctl(termios.FIONREAD, OWN, 0) == answer


def test_the_canary(mend: Mend) -> None:
    Socket(mend.library)
    mend.library.host_mark()
    assert mend.library.host_ioctl(termios.FIONREAD, OWN, 0) == abi.CANARY_ANSWER
