# SPDX-License-Identifier: Apache-2.0
"""What an application can see is what docs/limits.md says, no more and no less."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.semantics import report
from tests.semantics.runner import BLOCKING, Finding, Run, run_all, troubles
from tests.semantics.scenario import SCENARIOS

LIMITS = Path(__file__).parents[2] / "docs" / "limits.md"

Suite = tuple[list[Finding], list[Run]]


@pytest.fixture(scope="module")
def suite() -> Suite:
    """The whole suite, run once; what does not fit is run again, since the machine is shared."""
    findings, runs = run_all(jobs=8)
    doubtful = {*report.undocumented(findings), *report.vanished(findings)}
    doubtful |= {trouble.partition(" ")[0] for trouble in troubles(runs)}
    doubtful |= {
        finding.scenario.name
        for finding in findings
        if any(difference.mode == BLOCKING for difference in finding.differences)
    }
    if not doubtful:
        return findings, runs
    again, runs_again = run_all(sorted(doubtful), jobs=1)
    kept = [one for one in findings if one.scenario.name not in doubtful]
    return kept + again, [run for run in runs if run.scenario not in doubtful] + runs_again


def test_no_scenario_hangs_fails_or_misses_the_bypass(suite: Suite) -> None:
    assert troubles(suite[1]) == []


def test_between_blocking_ends_nothing_differs(suite: Suite) -> None:
    assert [
        (finding.scenario.name, difference.event)
        for finding in suite[0]
        for difference in finding.differences
        if difference.mode == BLOCKING
    ] == []


def test_every_difference_is_documented(suite: Suite) -> None:
    assert report.undocumented(suite[0]) == []


def test_every_documented_difference_is_there(suite: Suite) -> None:
    assert report.vanished(suite[0]) == []


def test_the_page_lists_every_scenario_that_differs() -> None:
    page = LIMITS.read_text()
    limited = [one for one in SCENARIOS.values() if one.limit]
    missing = [one.name for one in limited if one.title.replace("|", "\\|") not in page]
    assert missing == [], "run python -m tests.semantics --write docs/limits.md"
    assert f"Of {len(SCENARIOS)} behaviours" in page


def test_the_page_has_the_words_of_every_limit() -> None:
    page = LIMITS.read_text()
    limits = {one.limit for one in SCENARIOS.values() if one.limit}
    missing = [each.means for each in limits if f" | {each.means}. | {each.do} |\n" not in page]
    assert missing == [], "run python -m tests.semantics --write docs/limits.md"


def test_writing_the_page_keeps_its_prose() -> None:
    page = LIMITS.read_text()
    written = report.limits_page(page, [])
    assert page.startswith(written.partition("Of 0 behaviours")[0])
    end = "<!-- end: differences -->"
    assert written.partition(end)[2] == page.partition(end)[2]
    with pytest.raises(ValueError, match="begin: differences"):
        report.limits_page("# Limits\n", [])
