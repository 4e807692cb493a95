# SPDX-License-Identifier: Apache-2.0
"""What the integration tests share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def _root() -> None:
    """These tests make namespaces and load BPF programs: without root they fail, not skip."""
    if os.geteuid() != 0:
        pytest.exit("the integration tests must run as root", returncode=1)
