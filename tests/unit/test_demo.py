# SPDX-License-Identifier: Apache-2.0
"""In which modes the demo measures, and what it says of given results."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.bed.netns import LinkCounters
from tests.bed.pairs import KINDS, Bytes, Cost
from tests.bed.pingpong import HOPS
from tests.bed.wrk import Load
from tests.demo import modes, report
from tests.demo.__main__ import arguments
from tests.demo.measure import CONNECTIONS, HopRun, LoadRun, Measurements, Results
from tests.demo.modes import Mode

COST = Cost(1.0, 0.0, LinkCounters(1, 1, 64, 64), LinkCounters(1, 1, 64, 64))
AUTO = "mode proxy-only, what auto decides here"
FORCED = "mode full, which this kernel must be forced to"


@pytest.mark.parametrize(
    ("options", "verdict", "expected"),
    [
        ([], "full", {"auto": "mode full, what auto decides here"}),
        ([], "proxy-only", {"auto": AUTO, "full": FORCED}),
        ([], "off", {"full": FORCED}),
        (["--mode", "auto"], "proxy-only", {"auto": AUTO}),
        (["--mode", "auto"], "off", {}),
        (["--mode", "full"], "full", {"full": "mode full, forced"}),
        (["--mode", "full"], "off", {"full": FORCED}),
        (["--mode", "proxy-only"], "full", {"proxy-only": "mode proxy-only, forced"}),
        (
            ["--mode", "proxy-only"],
            "off",
            {"proxy-only": "mode proxy-only, which this kernel must be forced to"},
        ),
    ],
)
def test_modes(options: list[str], verdict: str, expected: dict[str, str]) -> None:
    chosen = modes.chosen(arguments(options).mode, verdict)
    assert {mode: modes.title(mode, verdict) for mode in chosen} == expected
    assert chosen == list(expected)


def measured(mode: Mode, bypass_us: int) -> Measurements:
    """One run of everything; TCP takes 100 us for a round trip, and for a request."""
    us = dict(zip(KINDS, (100, bypass_us)))
    return Measurements(
        mode,
        runs=1,
        hops=[HopRun(kind, hop, us[kind], us[kind]) for kind in KINDS for hop in HOPS],
        loads=[
            LoadRun(kind, connections, Load(10, 1.0, {us[kind]: 9, 150: 1}), COST)
            for kind in KINDS
            for connections in CONNECTIONS
        ],
        payload={hop: Bytes(100, 0) for hop in HOPS} | {"none": Bytes(0, 0)},
    )


def test_each_mode_is_shown_by_its_name(tmp_path: Path) -> None:
    results = Results("proxy-only", "[a fault]", [measured("auto", 90), measured("full", 60)])
    said = io.StringIO()
    report.show(Console(file=said, width=120), results)
    _, of_auto, *more_of_auto, of_full, _, _ = said.getvalue().split("\nmode ")
    assert len(more_of_auto) == 2
    assert of_auto.startswith(AUTO.removeprefix("mode "))
    assert "0.90" in of_auto
    assert of_full.startswith(FORCED.removeprefix("mode "))
    assert "0.60" in of_full
    assert "On this machine auto decides for mode proxy-only: [a fault]\n" in said.getvalue()

    report.write_json(results, {}, tmp_path / "demo.json")
    answer = json.loads((tmp_path / "demo.json").read_text())
    assert answer["auto"] == {"mode": "proxy-only", "reason": "[a fault]"}
    found = {
        mode: (each["title"], each["ratios"]["latency_1_connection"])
        for mode, each in answer["modes"].items()
    }
    assert found == {"auto": (AUTO, 0.9), "full": (FORCED, 0.6)}

    report.draw(results, tmp_path / "latency.png")
    assert (tmp_path / "latency.png").stat().st_size > 0


def test_mode_off_is_said_plainly() -> None:
    said = io.StringIO()
    report.show(Console(file=said, width=120), Results("off", "a fault", []))
    assert (
        "auto decides for mode off, so everything stays on TCP/IP unless forced: a fault"
        in said.getvalue()
    )
