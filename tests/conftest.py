# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# A job of nohup's ignores it, and so would each program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# By default an example must be done in 200 ms: no test asserts an absolute time.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

WITHOUT_ROOT = "unit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that make namespaces and load BPF programs fail without root, they are not skipped."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder != WITHOUT_ROOT and os.geteuid() != 0:
            pytest.exit(f"tests/{folder} must run as root", returncode=1)
