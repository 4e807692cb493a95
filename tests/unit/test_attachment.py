# SPDX-License-Identifier: Apache-2.0
"""What of an attachment can be computed without a kernel."""

from __future__ import annotations

import ipaddress
import socket

from hypothesis import given
from hypothesis import strategies as st

from bpf import abi
from cni_plugin import attachment, policy
from cni_plugin.state import Attachment

BLANK = Attachment("c", "eth0", "pods", "/x", "", "", "", "/x", 1, 7, 1, "gen-1", 0, 0, [], [])


def test_pod_id_is_stable() -> None:
    """Records outlive an upgrade of the plugin, so this number may never change."""
    assert attachment.pod_id("4f2ac1d0", "eth0") == 8239524634929520136


@given(st.text(), st.text())
def test_pod_id_is_a_non_zero_63_bit_number(container_id: str, ifname: str) -> None:
    assert 0 < attachment.pod_id(container_id, ifname) < 2**63


def test_pod_ids_differ() -> None:
    ids = {attachment.pod_id(f"{n:064x}", ifname) for n in range(20000) for ifname in ("a", "b")}
    assert len(ids) == 40000


def test_record_of() -> None:
    record = attachment.record_of(
        BLANK._replace(
            flags=abi.POD_PROXY_ONLY,
            proxy_uid=1337,
            ips=[["10.22.0.7", "eth0"], ["fd00::7", "eth0"]],
            excluded_ports=[[80, 80], [8000, 8100]],
        )
    )
    assert (record.id, record.flags, record.proxy_uid) == (7, 1, 1337)
    assert record.ip_count == 2
    assert bytes(record.ip[0]) == socket.inet_pton(socket.AF_INET6, "::ffff:10.22.0.7")
    assert bytes(record.ip[1]) == ipaddress.ip_address("fd00::7").packed
    assert record.excluded_count == 2
    assert (record.excluded[1].first, record.excluded[1].last) == (8000, 8100)
    assert record.excluded[2].last == 0


ports = st.integers(1, policy.MAX_PORT)
ranges = st.lists(st.tuples(ports, ports).map(lambda pair: (min(pair), max(pair))), max_size=20)


@given(ranges)
def test_merged_ports_cover_the_same_ports(given_ranges: list[tuple[int, int]]) -> None:
    merged = policy.merge_ports(given_ranges)
    assert {p for first, last in merged for p in range(first, last + 1)} == {
        p for first, last in given_ranges for p in range(first, last + 1)
    }
    assert all(left[1] + 1 < right[0] for left, right in zip(merged, merged[1:]))


@given(ranges)
def test_printed_ports_are_read_back(given_ranges: list[tuple[int, int]]) -> None:
    text = " , ".join(f"{first}-{last}" for first, last in given_ranges)
    assert policy.parse_ports(text) == given_ranges
