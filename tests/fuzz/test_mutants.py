# SPDX-License-Identifier: Apache-2.0
"""Rules of the programs, taken out one by one, are missed in a real kernel.

A case that holds with the rule fails without it. tests/fuzz/test_switch.py has a mutant for every
rule; here are those that need no moment which a test cannot choose.
"""

from __future__ import annotations

from contextlib import closing

import pytest

from bpf.loader import Programs
from tests.fuzz import cases, mutants
from tests.fuzz.cases import Case
from tests.fuzz.mutants import Mutant
from tests.light import LIMITS, accelerated

BREAKS = [
    (mutants.ORDER, cases.paused_with_bytes_unread),
    (mutants.RETURN, cases.paused_before_a_short_read),
    (mutants.OVERTAKING, cases.two_writers),
    (mutants.SHORT_SENDS, cases.member_that_sends_several),
    (mutants.URGENT, cases.urgent_byte),
    (mutants.NAGLE_STAYS, cases.member_without_nodelay),
    (mutants.NAGLE_PIECES, cases.messages_without_nodelay),
    (mutants.NAGLE_TWICE, cases.two_without_nodelay),
    (mutants.BOUND, cases.reader_that_rests),
    (mutants.FRESH_EDGE, cases.reader_that_wakes_late),
    (mutants.CONNTRACK, cases.idle_connection_tracking),
    (mutants.READERS_EVER, cases.blocking_duplex),
    (mutants.LEAVES_UNREAD, cases.leaves_unread),
    (mutants.LEAVES_UNHEARD, cases.leaves_before_a_short_read),
    (mutants.IDENTITY, cases.connections_set_up_together),
    (mutants.REUSED_SOCKET, cases.reused_socket),
]
CHANCES = 40  # what goes wrong without a rule may be a race


def name_of(value: object) -> str:
    """A parameter's part of the test's name."""
    if isinstance(value, Mutant):
        return value.rule.partition(":")[0]
    return str(getattr(value, "__name__", value))


def case_holds(programs: Programs, case: Case) -> bool:
    with accelerated(programs) as pod:
        pod.control(0)
        return cases.holds(case, pod)


@pytest.mark.parametrize(("mutant", "case"), BREAKS, ids=name_of)
def test_case_fails_without_the_rule(mutant: Mutant, case: Case) -> None:
    with closing(Programs(LIMITS)) as programs:
        assert case_holds(programs, case)
    with closing(mutant.programs()) as programs:
        assert not all(case_holds(programs, case) for _ in range(CHANCES)), mutant.rule
