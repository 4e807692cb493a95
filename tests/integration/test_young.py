# SPDX-License-Identifier: Apache-2.0
"""Connections too young to join: bpf/data_path/pairing.h, TB_MIN_SEGMENTS and TB_MIN_AGE."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest

from bpf.loader import Programs
from tests import light
from tests.fuzz.cases import Ends, holds
from tests.light import LIMITS, LightPod

YOUNG_MS = 200


@pytest.fixture
def pod() -> Iterator[LightPod]:
    with (
        closing(Programs(replace(LIMITS, segments=8, exchanges=8, age_ms=YOUNG_MS))) as programs,
        light.accelerated(programs) as made,
    ):
        yield made


def test_a_short_connection_is_left_alone(pod: LightPod) -> None:
    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        ends.exchange()
        ends.exchange()
        return True

    assert holds(ask, pod)
    total = pod.total()
    assert (total.connections, total.joined) == ({}, 0)
    assert total.tcp_messages == {}


def test_an_older_one_joins_with_its_next_exchanges(pod: LightPod) -> None:
    def ask(pod: LightPod) -> bool:
        ends = Ends(pod, joins=False)
        ends.exchange()
        time.sleep(1.5 * YOUNG_MS / 1000)
        ends.join(pod)
        return True

    assert holds(ask, pod)
    assert pod.total().joined == 2
    assert pod.total().connections == {"paired": 2}
