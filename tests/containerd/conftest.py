# SPDX-License-Identifier: Apache-2.0
"""One node with containerd for all tests; each must leave it as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.containerd.bed import RuntimeBed, open_bed


@pytest.fixture(scope="session")
def shared_bed() -> Iterator[RuntimeBed]:
    """The node; after all tests it must be as fresh as it was."""
    with open_bed() as bed:
        yield bed
        left = bed.leftovers()
        assert not any(left.values()), left


@pytest.fixture
def bed(shared_bed: RuntimeBed) -> Iterator[RuntimeBed]:
    """The node for one test; whatever it leaves there fails it, and goes before the next one."""
    bed = shared_bed.as_it_is()
    yield bed
    left = bed.leftovers()
    if any(left.values()):
        bed.remove_torn_results()  # or no sandbox can be ended, and each later test fails too
        bed.end_all_sandboxes()
        bed.remove_what_containerd_forgot()
    assert not any(left.values()), left
