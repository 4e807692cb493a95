# SPDX-License-Identifier: Apache-2.0
"""TCP's congestion control in the pods, whatever the machine's own is."""

from __future__ import annotations

import contextlib
import fcntl
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bed.netns import NetNamespace

USUAL = "cubic"  # Linux's own; the image of a machine may choose another
SYSCTLS = Path("/proc/sys/net/ipv4")  # of the namespace that the calling thread is in
_USERS = Path("/run/tb-congestion")  # its users share the lock; it lists what they added
ALLOWED = SYSCTLS / "tcp_allowed_congestion_control"  # the machine's, in its first namespace only


@contextmanager
def allowed(name: str) -> Iterator[None]:
    """Lets every namespace of the machine choose it, until the last user's end.

    Raises:
        OSError: this kernel has no such congestion control.
    """
    with socket.socket() as loads_its_module:
        loads_its_module.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
    with _USERS.open("a+") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        before = ALLOWED.read_text().split()
        if name not in before:
            ALLOWED.write_text(" ".join([*before, name]))
            print(name, file=users, flush=True)
        try:
            yield
        finally:
            with contextlib.suppress(BlockingIOError):  # another process still needs them
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                users.seek(0)
                added = users.read().split()
                left = [each for each in ALLOWED.read_text().split() if each not in added]
                ALLOWED.write_text(" ".join(left))
                _USERS.unlink(missing_ok=True)


def choose(netns: NetNamespace, name: str) -> None:
    """Makes it the namespace's default; raises OSError unless it is allowed()."""
    with netns.entered():
        (SYSCTLS / "tcp_congestion_control").write_text(name)
