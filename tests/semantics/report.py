# SPDX-License-Identifier: Apache-2.0
"""The findings as a table for people, as JSON, and as a part of docs/limits.md."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.semantics.runner import (
    BLOCKING,
    BYPASS,
    DIRECTIONS,
    PAUSED,
    Difference,
    Finding,
    Run,
    troubles,
)
from tests.semantics.scenario import Limit


def print_table(findings: Sequence[Finding], runs: Sequence[Run]) -> None:
    """The differences and the troubles, for a terminal."""
    console = Console(width=None if Console().is_terminal else 160)
    table = Table("behaviour", "event", "over TCP", "here", "when", "documented")
    for finding in findings:
        for difference, when in by_event(finding):
            table.add_row(
                *(finding.scenario.title, difference.event),
                *(text(difference.plain), text(difference.found), when),
                "yes" if finding.scenario.limit else "[red]NO",
            )
    console.print(table)
    differing = sum(finding.differs for finding in findings)
    console.print(f"{len(findings)} behaviours, {differing} differ, {len(runs)} runs")
    for trouble in troubles(runs):
        console.print(f"[red]{trouble}")


def by_event(finding: Finding) -> list[tuple[Difference, str]]:
    """Each event that differs once, with the modes and directions in which it does."""
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for difference in finding.differences:
        key = (difference.event, text(difference.plain), text(difference.found))
        groups.setdefault(key, []).append(difference)
    return [(group[0], when(group)) for group in groups.values()]


def when(group: Sequence[Difference]) -> str:
    """In which modes, and in which direction when it is one only."""
    modes = [
        mode.name for mode in (BLOCKING, BYPASS, PAUSED) if any(one.mode == mode for one in group)
    ]
    directions = {one.direction for one in group}
    only = "" if directions == set(DIRECTIONS) else f", {directions.pop()}"
    return " and ".join(modes) + only


def text(value: Any) -> str:
    """A transcript's value for the eyes."""
    if value == "":
        return "0 bytes"
    if isinstance(value, list):
        return ", ".join(text(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def as_json(findings: Sequence[Finding], runs: Sequence[Run]) -> str:
    """Everything, for machines: differences by scenario, troubles, and the kernel."""
    return json.dumps(
        {
            "kernel": platform.release(),
            "scenarios": len(findings),
            "runs": len(runs),
            "differing": {
                finding.scenario.name: {
                    "title": finding.scenario.title,
                    "documented": finding.scenario.limit is not None,
                    "events": [
                        {
                            "event": difference.event,
                            "plain": difference.plain,
                            "found": difference.found,
                            "when": when_,
                        }
                        for difference, when_ in by_event(finding)
                    ],
                }
                for finding in findings
                if finding.differs
            },
            "undocumented": undocumented(findings),
            "vanished": vanished(findings),
            "troubles": troubles(runs),
        },
        indent=1,
    )


def undocumented(findings: Sequence[Finding]) -> list[str]:
    """Scenarios that differ and have no entry in the table."""
    return [one.scenario.name for one in findings if one.differs and not one.scenario.limit]


def vanished(findings: Sequence[Finding]) -> list[str]:
    """Scenarios whose entry says that they differ on every kernel, and that do not."""
    return [
        one.scenario.name
        for one in findings
        if one.scenario.limit and one.scenario.limit.everywhere and not one.differs
    ]


def limits_page(page: str, findings: Sequence[Finding]) -> str:
    """docs/limits.md with these findings in the place of its own; its prose stays.

    Raises:
        ValueError: the page does not have both marks, each on a line of its own.
    """
    begin, end = "<!-- begin: differences -->\n", "<!-- end: differences -->\n"
    before, found_begin, rest = page.partition(begin)
    _, found_end, behind = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the page has no lines {begin.strip()} and {end.strip()}")
    return "".join([before, begin, *(f"{line}\n" for line in _differences(findings)), end, behind])


def _differences(findings: Sequence[Finding]) -> Iterator[str]:
    yield (
        f"Of {len(findings)} behaviours (tests/semantics/scenarios), "
        f"on Linux {platform.release()}; the others came out the same:"
    )
    yield ""
    yield "| behaviour: over TCP → here | what it means | what to do |"
    yield "| --- | --- | --- |"
    by_limit: dict[Limit, list[Finding]] = {}
    for finding in findings:
        if finding.scenario.limit:
            by_limit.setdefault(finding.scenario.limit, []).append(finding)
    for limit, group in by_limit.items():
        yield f"| {'<br>'.join(map(cell, group))} | {limit.means}. | {limit.do} |"


def cell(finding: Finding) -> str:
    """A behaviour and what came out: over TCP, then here."""
    rows = by_event(finding)
    if not rows:
        return f"**{finding.scenario.title}**: the same on this kernel"
    difference, modes = rows[0]
    came = f"{difference.event}: {text(difference.plain)} → {text(difference.found)}"
    paused = ""
    if PAUSED.name in modes:
        paused = ", also paused" if BYPASS.name in modes else ", paused only"
    return f"**{finding.scenario.title}**: {came}{paused}".replace("|", "\\|")
