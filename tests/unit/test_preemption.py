# SPDX-License-Identifier: Apache-2.0
"""What says where a kernel preempts threads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bpf import preemption


@pytest.mark.parametrize(
    ("version", "debugfs", "model", "is_within"),
    [
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.1", "none (voluntary) full\n", "voluntary", False),
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.12", "none voluntary (full)\n", "full", True),
        ("#1 SMP PREEMPT_DYNAMIC Debian 7.3", "full (lazy)\n", "lazy", True),
        ("#1 SMP PREEMPT_DYNAMIC @0", "", "", True),
        ("#1 SMP PREEMPT Debian", "", "full", True),
        ("#1 SMP PREEMPT_RT Debian", "", "full", True),
        ("#1 SMP Debian", "", "voluntary", False),
    ],
)
def test_model(
    monkeypatch: pytest.MonkeyPatch, version: str, debugfs: str, model: str, is_within: bool
) -> None:
    monkeypatch.setattr("bpf.preemption.os.uname", lambda: SimpleNamespace(version=version))
    monkeypatch.setattr(preemption, "_read_debugfs", lambda _: debugfs)
    assert preemption.model() == model
    assert preemption.is_within_programs(model) is is_within


def test_a_kernel_without_debugfs_says_nothing() -> None:
    assert preemption._read_debugfs("no/such/file") == ""
