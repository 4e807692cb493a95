"""Real applications over the bypass: each byte right, no stall, no socket left half-closed."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.apps import bed
from tests.apps.bed import AppNode
from tests.apps.place import HopName
from tests.apps.registry import APPLICATIONS

# "full" is all three hops; "auto" is what this kernel is trusted with.
CASES = [
    pytest.param(mode, name, hop, id=f"{mode}-{name}-{hop}")
    for mode in ("full", "auto")
    for name, application in APPLICATIONS.items()
    for hop in (application.hops if mode == "full" else application.hops[-1:])
]


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    """These tests make namespaces and load BPF programs: without root they fail, not skip."""
    if os.geteuid() != 0:
        pytest.exit("the applications' tests must run as root", returncode=1)


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[str, AppNode]]:
    with bed.opened("full", "bypass") as full, bed.opened("auto", "bypass") as auto:
        yield {"full": full, "auto": auto}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("mode", "name", "hop"), CASES)
def test_every_byte_is_right(nodes: dict[str, AppNode], mode: str, name: str, hop: HopName) -> None:
    application, node = APPLICATIONS[name], nodes[mode]
    must_bypass = mode == "full" and application.reader == "event loop"
    with bed.served(node, application, hop, "bypass") as where:
        bed.check(node, application, where, must_bypass=must_bypass)
