# SPDX-License-Identifier: Apache-2.0
"""Network namespaces: made, entered, looked into.

pyroute2's own way into a namespace (NetNS, netns.create) forks this process, and such a child
hangs when another thread held a lock, and unwinds our context managers when a signal comes. So the
calling thread enters the namespace itself, which costs nothing and forks nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyroute2
import pyroute2.netns

from tests.bed.enter import CLONE_NEWNET, libc, must


@dataclass(frozen=True)
class LinkCounters:
    """What an interface has sent and received; bytes include the Ethernet headers."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int

    def __sub__(self, earlier: LinkCounters) -> LinkCounters:
        return LinkCounters(
            self.rx_packets - earlier.rx_packets,
            self.tx_packets - earlier.tx_packets,
            self.rx_bytes - earlier.rx_bytes,
            self.tx_bytes - earlier.tx_bytes,
        )

    def __add__(self, other: LinkCounters) -> LinkCounters:
        return LinkCounters(
            self.rx_packets + other.rx_packets,
            self.tx_packets + other.tx_packets,
            self.rx_bytes + other.rx_bytes,
            self.tx_bytes + other.tx_bytes,
        )

    @property
    def packets(self) -> int:
        return self.rx_packets + self.tx_packets

    @property
    def bytes(self) -> int:
        return self.rx_bytes + self.tx_bytes


@dataclass(frozen=True)
class NetNamespace:
    """A named network namespace, as `ip netns` lists it."""

    name: str
    # The path of the user namespace that owns it; empty: our own.
    users: str = field(default="", kw_only=True)

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.name

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Have the calling thread in this namespace: for its sockets, and processes it starts."""
        with _returning_home():
            away = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                must(libc.setns(away, CLONE_NEWNET), f"setns to {self.path}")
            finally:
                os.close(away)
            yield

    def link_counters(self, ifname: str) -> LinkCounters:
        """The counters of one interface.

        Raises:
            LookupError: there is no such interface here.
        """
        with self.entered(), pyroute2.IPRoute() as route:
            for link in route.get_links(ifname=ifname):
                stats = link.get_attr("IFLA_STATS64")
                names = ("rx_packets", "tx_packets", "rx_bytes", "tx_bytes")
                return LinkCounters(*(stats[name] for name in names))
        raise LookupError(f"network namespace {self.name} has no interface {ifname}")


@contextmanager
def _returning_home() -> Iterator[None]:
    """Bring the calling thread back into the namespace that it is in now."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        must(libc.setns(home, CLONE_NEWNET), "setns back")
        os.close(home)


@contextmanager
def created(name: str) -> Iterator[NetNamespace]:
    """A new network namespace with its loopback interface up, removed on leaving."""
    try:
        with _returning_home():
            must(libc.unshare(CLONE_NEWNET), "unshare(CLONE_NEWNET)")
            pyroute2.netns.attach(name, "thread-self")  # reads /proc/<pid>/ns/net
            with pyroute2.IPRoute() as route:
                route.link("set", index=1, state="up")
        yield NetNamespace(name)
    finally:
        remove(name)


@contextmanager
def created_for_users(name: str, first_uid: int) -> Iterator[NetNamespace]:
    """One that a user namespace owns, in which the host's users from `first_uid` on begin at 0."""
    # It ends with its input; its first byte says that both namespaces are there.
    argv = ["unshare", "--user", "--net", "cat"]
    holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    try:
        assert holder.stdin
        assert holder.stdout
        holder.stdin.write(b"!")
        holder.stdout.read(1)
        for map_name in ("uid_map", "gid_map"):
            Path(f"/proc/{holder.pid}/{map_name}").write_text(f"0 {first_uid} 65536")
        pyroute2.netns.attach(name, holder.pid)
        space = NetNamespace(name, users=f"/proc/{holder.pid}/ns/user")
        with space.entered(), pyroute2.IPRoute() as route:
            route.link("set", index=1, state="up")
        yield space
    finally:
        holder.communicate()
        remove(name)


def without_duplicate_detection(space: NetNamespace) -> None:
    """IPv6 addresses are usable at once there, not a second or two later; if there are any."""
    with space.entered():
        for scope in ("all", "default"):
            setting = Path(f"/proc/sys/net/ipv6/conf/{scope}/accept_dad")
            if setting.exists():
                setting.write_text("0")


def remove(name: str) -> None:
    """Remove a network namespace if it is there."""
    if name in pyroute2.netns.listnetns():
        pyroute2.netns.remove(name)


def names(prefix: str) -> list[str]:
    """The network namespaces whose name begins with prefix."""
    return sorted(name for name in pyroute2.netns.listnetns() if name.startswith(prefix))
