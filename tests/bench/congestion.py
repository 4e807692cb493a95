"""TCP's congestion control in the pods that are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bed.netns import NetNamespace

SYSCTLS = Path("/proc/sys/net/ipv4")  # of the namespace that the calling thread is in
ALLOWED = SYSCTLS / "tcp_allowed_congestion_control"  # the machine's, in its first namespace only


@contextmanager
def allowed(name: str) -> Iterator[None]:
    """Lets every namespace of the machine choose it, until the end.

    Raises:
        OSError: this kernel has no such congestion control.
    """
    before = ALLOWED.read_text()
    ALLOWED.write_text(f"{before.strip()} {name}")
    try:
        yield
    finally:
        ALLOWED.write_text(before)


def choose(netns: NetNamespace, name: str) -> None:
    """Makes it the namespace's default; raises OSError unless it is allowed()."""
    with netns.entered():
        (SYSCTLS / "tcp_congestion_control").write_text(name)


def current() -> str:
    """The machine's own choice."""
    return (SYSCTLS / "tcp_congestion_control").read_text().strip()
