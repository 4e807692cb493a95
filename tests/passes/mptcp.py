# SPDX-License-Identifier: Apache-2.0
"""TCP clients of MPTCP listeners, v4 and v6, under passes: both ends join, nothing breaks."""

from __future__ import annotations

import socket
import time
from typing import Any

from tests.light import LightPod, accelerated, away_from_pods, set_nodelay
from tests.passes import churn

_IPPROTO_MPTCP = 262
MOST_EXCHANGES = 500  # a socket joins after some twenty, and 50 ms


def joined(pod: LightPod, family: socket.AddressFamily) -> int:
    """How many ends of one TCP client's connection to an MPTCP listener passes take in."""
    address = "127.0.0.1" if family == socket.AF_INET else "::1"
    before = pod.members()
    with socket.socket(family, socket.SOCK_STREAM, _IPPROTO_MPTCP) as listener:
        listener.bind((address, 0))
        listener.listen()
        with socket.socket(family) as client:
            set_nodelay(client)
            client.settimeout(5)
            client.connect(listener.getsockname())
            with listener.accept()[0] as server:
                set_nodelay(server)
                server.settimeout(5)
                for _ in range(MOST_EXCHANGES):
                    client.sendall(b"c")
                    server.recv(1)
                    server.sendall(b"s")
                    client.recv(1)
                    time.sleep(0.001)
                    pod.visit()
                    if pod.members() - before == 2:
                        break
                return pod.members() - before


def ends_that_join() -> dict[str, int]:
    """joined() by the family's name."""
    with accelerated(passes=False) as pod:
        pod.enter()
        try:
            families = (socket.AF_INET, socket.AF_INET6)
            return {family.name: joined(pod, family) for family in families}
        finally:
            away_from_pods()


def main(seconds: float = 60) -> dict[str, Any]:
    ends = ends_that_join()
    found = churn.main(seconds, "mptcp")
    missing = [f"{count} ends joined, {name}" for name, count in ends.items() if count != 2]
    return {"ends that join": ends, **found, "problems": [*found["problems"], *missing]}
