# SPDX-License-Identifier: Apache-2.0
"""Each rule of the programs, taken out, is missed: a case that holds with it fails without it."""

from __future__ import annotations

import pytest

from bpf.loader import Programs
from tests.fuzz import cases, mutants
from tests.fuzz.cases import Case
from tests.fuzz.mutants import Mutant
from tests.light import LIMITS, accelerated
from tests.semantics import runner
from tests.semantics.scenario import SCENARIOS

TIMEOUT_S = 10  # a mutant may well hang

# (mutant, scenario of tests/semantics, direction, events that must come out as over plain TCP)
BY_SCENARIO = [
    (mutants.ORDER, "deferred_accept", 0, {"corrupted connections"}),
    (mutants.IDENTITY, "connections_set_up_together", 0, {"wrong"}),
    (mutants.BACKPRESSURE, "stalled_reader", 0, {"stopped by", "lost"}),
]

BY_CASE = [
    (mutants.WAKE_UP, cases.sleeping_reader),
    (mutants.CONNTRACK, cases.idle_connection_tracking),
    (mutants.OVERTAKING, cases.two_writers),
    (mutants.REUSED_SOCKET, cases.reused_socket),
    (mutants.LEAVING_UNREAD, cases.edge_triggered_reader_that_parts),
]


def name_of(value: object) -> str:
    """A parameter's part of the test's name."""
    if isinstance(value, Mutant):
        return value.rule.partition(":")[0]
    return str(getattr(value, "__name__", value))


def scenario_holds(programs: Programs, name: str, direction: int, events: set[str]) -> bool:
    """Whether these events of a scenario come out over the bypass as over plain TCP."""
    runs = [
        runner.run_one(SCENARIOS[name], runner.DIRECTIONS[direction], mode, loaded, TIMEOUT_S)
        for mode, loaded in ((runner.PLAIN, None), (runner.BYPASS, programs))
    ]
    plain, bypassed = (
        [event for event in run.transcript if event[0] in {*events, "EXCEPTION", "HANG"}]
        for run in runs
    )
    return plain == bypassed


def case_holds(programs: Programs, case: Case) -> bool:
    with accelerated(programs) as pod:
        return cases.holds(case, pod)


@pytest.mark.parametrize(("mutant", "name", "direction", "events"), BY_SCENARIO, ids=name_of)
def test_scenario_fails_without_the_rule(
    mutant: Mutant, name: str, direction: int, events: set[str]
) -> None:
    assert scenario_holds(Programs(LIMITS), name, direction, events)
    assert not scenario_holds(mutant.programs(), name, direction, events), mutant.rule


CHANCES = 10


@pytest.mark.parametrize(("mutant", "case"), BY_CASE, ids=name_of)
def test_case_fails_without_the_rule(mutant: Mutant, case: Case) -> None:
    assert case_holds(Programs(LIMITS), case)
    # What goes wrong without a rule is a race: some chances to see it.
    assert not all(case_holds(mutant.programs(), case) for _ in range(CHANCES)), mutant.rule
