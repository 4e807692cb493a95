# SPDX-License-Identifier: Apache-2.0
"""The benchmark's sections run, with hardly any work: what they measure is not asserted."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from tests.bed.cpus import Cpus
from tests.bench import report, tables
from tests.bench.__main__ import SECTIONS, run_section
from tests.bench.results import Results

WANTED = {
    "hops": {
        *("inbound/v4/64", "outbound/v4/64", "sidecars/v4/64", "unix/64"),
        "inbound/blocking/64",
    },
    "streaming": {"inbound/duplex/same/4096"},
    "mesh": {"closed/http2/2", "unix/2", "fixed/none/small/100", "fixed/filter/small/100"},
    "churn": {"inbound", "outbound", "sidecars"},
    "answers": {"inbound/same/65536/16384", "sidecars/same/65536/16384"},
    "others": {"out", "in", "stranger"},
    "scale": {"pods/0", "pods/2", "connections/1", "connections/10", "connections/10/memory"},
}


@pytest.mark.parametrize("name", SECTIONS)
def test_section(name: str, tmp_path: Path) -> None:
    *others, measured = map(str, sorted(os.sched_getaffinity(0)))
    said = io.StringIO()
    section = run_section(name, "smoke", Cpus(measured, tuple(others)), Console(file=said))
    assert "incomplete" not in section.machine, said.getvalue()
    assert set(section.cases()) == WANTED[name]
    for case in WANTED[name] - {f"{case}/memory" for case in WANTED[name]}:
        kinds = {sample.variant for sample in section.samples if sample.case == case}
        assert kinds == {"unix"} or {"plain", "bypass"} <= kinds, case
    page, every_table = tmp_path / "benchmarks.md", tmp_path / "tables.md"
    report.write(Results({name: section}), page, tmp_path, every_table)
    assert f"## {tables.CHAPTERS[name].title}" in page.read_text()
    assert "| " in every_table.read_text().partition(f"## {tables.CHAPTERS[name].title}")[2]
