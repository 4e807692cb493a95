# SPDX-License-Identifier: Apache-2.0
"""Real applications over the bypass: each byte right, no stall that TCP does not have, no socket
left half-closed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.apps import bed, report
from tests.apps.__main__ import Plan, is_late, measure, refuse_stalls
from tests.apps.application import Application
from tests.apps.bed import AppNode, Mode
from tests.apps.place import TWO_HOPS, HopName
from tests.apps.registry import APPLICATIONS
from tests.bed.cpus import Cpus
from tests.bed.pairs import KINDS, Kind
from tests.bench.results import Results

# "full" is all three hops; "auto" is what this kernel is trusted with. An application that needs
# what this kernel gets wrong has only the latter.
CASES = [
    pytest.param(mode, name, hop, id=f"{mode}-{name}-{hop}")
    for mode in ("full", "auto")
    for name, application in APPLICATIONS.items()
    for hop in (application.hops if mode == "full" else TWO_HOPS)
]


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict[Mode, AppNode]]:
    with bed.opened({"full": KINDS, "auto": ("bypass",)}) as made:
        yield made


@pytest.mark.timeout(300, func_only=True)
@pytest.mark.parametrize(("mode", "name", "hop"), CASES)
def test_every_byte_is_right(
    nodes: dict[Mode, AppNode], mode: Mode, name: str, hop: HopName
) -> None:
    application, node = APPLICATIONS[name], nodes[mode]
    if mode == "full":
        skip_what_the_kernel_breaks(application, node)
    must_bypass = mode == "full" and application.may_bypass

    def checked(kind: Kind) -> float:
        with bed.served(node, application, hop, kind) as where:
            bypasses = must_bypass and kind == "bypass"
            return bed.check(node, application, where, must_bypass=bypasses)

    taken_s = {kind: checked(kind) for kind in node.pods}
    if "plain" in taken_s:
        if is_late(taken_s):  # perhaps the machine is busier by now
            taken_s["plain"] = max(taken_s["plain"], checked("plain"))
        refuse_stalls(taken_s)


def skip_what_the_kernel_breaks(application: Application, node: AppNode) -> None:
    """It would break here in `full`: so the self-test must give less, and name this very fault."""
    verdict, faults = bed.verdict(node), bed.faults(node, application)
    if not faults:
        return
    assert verdict["mode"] != "full"
    assert faults <= {reason.partition(":")[0] for reason in verdict["reasons"]}
    pytest.skip(f"this kernel fails {', '.join(sorted(faults))}; it runs in auto")


def test_a_measurement_makes_a_page(nodes: dict[Mode, AppNode], tmp_path: Path) -> None:
    *others, measured = map(str, sorted(os.sched_getaffinity(0)))
    said = io.StringIO()
    plan = Plan(pairs=1, seconds=0.1, hops=("outbound",))
    section = measure(
        nodes["full"],
        APPLICATIONS["redis"],
        plan,
        Cpus(measured, tuple(others)),
        Console(file=said),
    )
    assert section.machine["failures"] == {}, said.getvalue()
    results = Results({"redis": section})
    page, picture = tmp_path / "applications.md", tmp_path / "applications.png"
    tables = tmp_path / "tables.md"
    report.draw(results, picture)
    report.write(results, page, picture)
    report.write_tables(results, tables)
    assert "| Redis, redis-benchmark | event loop |" in page.read_text()
    assert "| outbound | GET 64 B |" in tables.read_text()
    assert picture.stat().st_size > 0
