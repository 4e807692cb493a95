# SPDX-License-Identifier: Apache-2.0
"""Python's view of tcpip_bypass.h: every struct that crosses the kernel border.

The frozen plugin imports this module, so it imports nothing but ctypes. That it agrees with
the header, member by member, is checked by tests/unit/test_abi.py.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint16, c_uint32, c_uint64

MAX_IPS = 8
MAX_PORT_RANGES = 16
FIRST_COST = 500
SILENCE_S = 5
VISIT_AGAIN = 0xFFFFFFFF
LOOK_UP = 0xFFFFFFFE
NO_FILE = 0xFFFFFFFD
NEEDS_EDGE = 1
NEEDS_VISIT = 2
TAKE_IN = 0x74620001

POD_PROXY_ONLY = 1
POD_FORCED = 2
POD_SERVICES = 4
CONTROL_PAUSED = 1
CONTROL_PODS_PAUSED = 2
CONTROL_LEAVE = 4
CONTROL_TRIAL = 8
CANARY = 0x7FFFFFFFFFFFFFFF
CANARY_ANSWER = 20263

HOPS = ("none", "inbound", "outbound", "sidecars", "local", "direct")
REASONS = (
    "none",
    "waiting",
    "leaving",
    "order",
    "backlog",
    "blocking",
    "busy",
    "memory",
    "corked",
    "stream",
    "refresh",
    "paused",
    "half_closed",
    "ineligible",
)
OUTCOMES = (
    "none",
    "paired",
    "no_peer",
    "mismatch",
    "excluded",
    "ineligible",
    "blocking",
    "options",
    "splice",
    "stream",
    "nagle",
    "busy",
    "full",
)
# Those of connections that were never paired, counted under no hop; and those of paired ones.
UNPAIRED = ("no_peer", "mismatch", "excluded", "full")
PAIRED = ("paired", *OUTCOMES[OUTCOMES.index("ineligible") :])


class Addr(ctypes.Structure):
    """An IPv6 address in network byte order; IPv4 a.b.c.d is ::ffff:a.b.c.d."""

    _fields_ = [("word", c_uint32 * 4)]


class PortRange(ctypes.Structure):
    """Ports from first to last, both included, in host byte order."""

    _fields_ = [("first", c_uint16), ("last", c_uint16)]


class Pod(ctypes.Structure):
    """Value of map ``pods``: what ADD tells the programs about one pod."""

    _fields_ = [
        ("id", c_uint64),
        ("flags", c_uint32),
        ("proxy_uid", c_uint32),
        ("reserved_1", c_uint32),
        ("ip_count", c_uint32),
        ("excluded_count", c_uint32),
        ("netns", c_uint32),
        ("ip", Addr * MAX_IPS),
        ("excluded", PortRange * MAX_PORT_RANGES),
    ]


class CgroupStorageKey(ctypes.Structure):
    """Key of map ``pods``: the kernel's struct bpf_cgroup_storage_key (linux/bpf.h)."""

    _fields_ = [("cgroup_inode_id", c_uint64), ("attach_type", c_uint32), ("pad", c_uint32)]


class Control(ctypes.Structure):
    """The only element of map ``control``."""

    _fields_ = [("flags", c_uint32), ("reserved", c_uint32)]


class Due(ctypes.Structure):
    """Value of map ``due``, by pod ID: when a pass over a pod's processes is worth its cost."""

    _fields_ = [
        ("missed", c_uint64),
        ("cost", c_uint64),
        ("pending", c_uint32),
        ("edge", c_uint32),
    ]


class Found(ctypes.Structure):
    """A socket that a visit to files names; program tb_visit_socket reads it behind an Ethernet
    header."""

    _fields_ = [
        ("mark", c_uint32),
        ("fd", c_uint32),
        ("visitor", c_uint32),
        ("netns", c_uint32),
        ("sk", c_uint64),
        ("cookie", c_uint64),
        ("peer", Addr),
        ("own", Addr),
        ("peer_port", c_uint16),
        ("own_port", c_uint16),
        ("device", c_uint32),
    ]


class Fionread(ctypes.Structure):
    """The only element of map ``fionread``."""

    _fields_ = [("lost", c_uint64)]


class CounterKey(ctypes.Structure):
    """Key of map ``counters``."""

    _fields_ = [("pod_id", c_uint64), ("hop", c_uint32), ("reserved", c_uint32)]


class Counters(ctypes.Structure):
    """Value of map ``counters``, one per possible CPU."""

    _fields_ = [
        ("bypassed_messages", c_uint64),
        ("bypassed_bytes", c_uint64),
        ("tcp_messages", c_uint64 * len(REASONS)),
        ("tcp_bytes", c_uint64),
        ("connections", c_uint64 * len(OUTCOMES)),
        ("joined", c_uint64),
        ("left", c_uint64),
    ]
