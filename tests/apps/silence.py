# SPDX-License-Identifier: Apache-2.0
"""For how long no byte moves between the ends of an application: a stall, however it ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

# A whole check over plain TCP takes one second; on an emulated CPU Java alone starts as long.
SILENCE_S = float(os.environ.get("TB_SILENCE_S", "20"))
LOOK_S = 0.5
QUIET_BYTES = 2000  # from look to look: what probes of idle connections come to

Look = tuple[float, int]  # when, in seconds, and the bytes that had moved by then


def longest_s(looks: Sequence[Look]) -> float:
    """The longest time from the last look that saw bytes move to another that saw none."""
    longest = 0.0
    since = looks[0][0]
    for (_, before), (now, moved) in zip(looks, looks[1:]):
        if moved - before > QUIET_BYTES:
            since = now
        longest = max(longest, now - since)
    return longest


@contextmanager
def refused(moved: Callable[[], int]) -> Iterator[None]:
    """Raises AssertionError on leaving when no byte has moved for SILENCE_S meanwhile.

    moved: how many bytes have, so far.
    """
    over = threading.Event()

    def look_on() -> list[Look]:
        looks = [(time.monotonic(), moved())]
        while not over.wait(LOOK_S):
            looks.append((time.monotonic(), moved()))
        return looks

    with ThreadPoolExecutor(1) as pool:
        looking: Future[list[Look]] = pool.submit(look_on)
        try:
            yield
        finally:
            over.set()
        longest = longest_s(looking.result())
    assert longest < SILENCE_S, f"no byte has moved for {longest:.0f} s"
