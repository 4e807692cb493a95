# SPDX-License-Identifier: Apache-2.0
"""Every case of tests/fixtures/plugin, run from the source tree."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.unit import cases


@pytest.mark.parametrize("case", cases.all_cases(), ids=lambda case: case.name)
def test_case(case: cases.Case, tmp_path: Path) -> None:
    answer = case.run([sys.executable, "-m", "cni_plugin"], tmp_path)
    cases.check(case, answer, tmp_path)


def test_there_are_enough_cases() -> None:
    """A glob that finds no case would pass."""
    assert len(cases.all_cases()) >= 290
