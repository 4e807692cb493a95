# SPDX-License-Identifier: Apache-2.0
"""How often a bypassed connection must show conntrack that it lives.

A bypassed connection sends no packets. Its entries in the pod's and in the node's conntrack table
would expire, and its FIN would never be translated again. So the programs turn keepalive on, with
an interval from here.
"""

from __future__ import annotations

from pathlib import Path

from cni_plugin import netns

_TIMEOUT = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established")

# Keepalive probes may get lost, so several fit into one timeout. The interval has a limit, so that
# a timeout that is shortened later does not cut connections.
_PROBES_PER_TIMEOUT = 4
_LONGEST_S = 120


def keepalive_s(netns_path: str) -> int:
    """Seconds between probes for connections of a pod; raises OSError when it has no namespace.

    The file shows the reader's own network namespace: read here for the node's, then in the
    pod's. Without conntrack there is no such file, and no entry to keep.
    """
    timeouts = [_established_timeout()]
    with netns.entered(netns_path):
        timeouts.append(_established_timeout())
    return interval([timeout for timeout in timeouts if timeout is not None])


def _established_timeout() -> int | None:
    try:
        return int(_TIMEOUT.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def interval(timeouts: list[int]) -> int:
    """Seconds between probes that suit the shortest of these timeouts (in seconds)."""
    shortest = min(timeouts, default=_LONGEST_S * _PROBES_PER_TIMEOUT)
    return max(1, min(shortest // _PROBES_PER_TIMEOUT, _LONGEST_S))
