# SPDX-License-Identifier: Apache-2.0
"""What the loader concludes from the kernel's name."""

from __future__ import annotations

import pytest

from bpf.loader import has_hard_receive_limit, names_modules


@pytest.mark.parametrize(
    ("release", "strict"),
    [
        ("5.10.0-46-cloud-amd64", False),
        ("6.12.117+deb13-cloud-amd64", False),
        ("6.16.12", False),
        ("6.17.0-14-generic", True),
        ("6.17.13+deb13-cloud-amd64", True),
        ("6.18-rc3", True),
        ("6.18.16", True),
        ("6.18.17", False),
        ("6.18.100", False),
        ("6.19.6", True),
        ("6.19.7", False),
        ("7.2.12+deb13-cloud-amd64", False),
        ("10.0", False),
        ("unheard of", False),
    ],
)
def test_kernels_that_drop_what_passes_the_receive_buffer(release: str, strict: bool) -> None:
    assert has_hard_receive_limit(release) is strict


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.26.0", False), ("0.27.0+ds-1", False), ("0.28.0", True), ("0.31.0", True), ("1.0", True)],
)
def test_bcc_wants_the_module_of_a_function_since_0_28(version: str, expected: bool) -> None:
    assert names_modules(version) is expected
