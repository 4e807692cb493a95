# SPDX-License-Identifier: Apache-2.0
"""What an application is to the bed, and what a load of it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from tests.apps.place import HOPS, HopName, Place
from tests.bed.wrk import Load

# http: an undeclared port, so that the sidecars inspect the first bytes; http2: by prior knowledge;
# tcp: an undeclared port of another protocol whose client speaks first; server-first: declared.
Protocol = Literal["http", "http2", "tcp", "server-first"]
# How both ends read: a non-blocking socket, one that recv sleeps in, one that is spliced.
Reader = Literal["event loop", "blocking", "splice"]


@dataclass(frozen=True)
class Figures:
    """One run of a load. bytes: of payload, 0 where they are not what counts.

    Latencies are None where messages go one way.
    """

    requests: int
    seconds: float
    p50_us: float | None
    p99_us: float | None
    bytes: int = 0


def figures(latencies_us: Iterable[float], seconds: float, payload: int = 0) -> Figures:
    """The figures of requests by their latencies; payload: bytes that each carried.

    Raises:
        ValueError: there were none.
    """
    ordered = sorted(latencies_us)
    if not ordered:
        raise ValueError("no request was answered")
    p50, p99 = (ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 99))
    return Figures(len(ordered), seconds, p50, p99, payload * len(ordered))


def of_load(load: Load, payload: int = 0) -> Figures:
    """The figures of a run of wrk or h2load; payload: bytes of an answer."""
    p50, p99 = load.latency_us(50), load.latency_us(99)
    return Figures(load.requests, load.duration_s, p50, p99, payload * load.requests)


Serve = Callable[[Place], AbstractContextManager[None]]
LoadRun = Callable[[Place, float], Figures]  # a load that lasts about so many seconds


@dataclass(frozen=True)
class Application:
    """A client and a server, or a proxy between both.

    check raises when a byte is wrong or late. loads are by title. lasting: connections live long
    enough, and carry enough both ways, to be joined. fionread: an end of them uses that ioctl.
    """

    name: str
    title: str
    reader: Reader
    protocol: Protocol
    serve: Serve
    check: Callable[[Place], None]
    loads: Mapping[str, LoadRun] = field(default_factory=dict)
    hops: tuple[HopName, ...] = HOPS
    advice: str = ""
    lasting: bool = True
    fionread: bool = False  # it asks how much there is to read

    @property
    def may_bypass(self) -> bool:
        """Whether its check joins where the kernel does right all it needs. One that splices may
        join before its pod has been seen to, which is up to its first exchanges."""
        return self.lasting and self.reader == "event loop"

    @property
    def needs(self) -> frozenset[str]:
        """What the kernel must do right for it: checks of install/program/selftest.py."""
        splice = {"splice"} if self.reader == "splice" else set()
        return frozenset(
            splice | ({"fionread_bypassed", "fionread_tcp"} if self.fionread else set())
        )
