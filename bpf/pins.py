# SPDX-License-Identifier: Apache-2.0
"""What the programs and their maps are called on a node.

Constants only and no imports: the plugin loads this module.
"""

from __future__ import annotations

# Below the bpffs folder: ``current`` -> ``gen-<N>``, and in a generation:
CURRENT = "current"
SOCK_OPS = "sock_ops"
PODS = "pods"
COUNTERS = "counters"
SK_MSG = "sk_msg"
SOCKHASH = "sockhash"
CONTROL = "control"
PAUSED_PODS = "paused_pods"
DUE = "due"
BEAT = "beat"
BELL = "bell"
SPLICE_REFUSAL = "splice_refusal"  # a link, where the kernel allows it
SPLICERS = "splicers"
MENDS = ("mend_inet_ioctl", "mend_inet6_ioctl")  # links, where the kernel gets FIONREAD wrong
# Each of these once more, where the kernel may leave one out: preemption.py.
AGAIN = "_again"
TRACES = tuple(pin + again for pin in (SPLICE_REFUSAL, *MENDS) for again in ("", AGAIN))
CONNS = "conns"
FIONREAD = "fionread"
VISIT = "visit"  # the iterator over the open files of a process
VISIT_SOCKET = "visit_socket"  # visits what that names, where it must not go to a file's socket
TAKE_IN = "take_in"  # for the sockets that are older than their pod's attachment

# How our programs are recognised on a cgroup when no record of ours is at hand.
SOCK_OPS_NAME = "tb_sock_ops"
