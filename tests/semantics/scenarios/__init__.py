# SPDX-License-Identifier: Apache-2.0
"""The scenarios, by what they are about; importing this package registers them all."""

from tests.semantics.scenarios import (
    blocking,
    closing,
    connecting,
    reading,
    sharing,
    state,
    waiting,
    writing,
)

__all__ = [
    "blocking",
    "closing",
    "connecting",
    "reading",
    "sharing",
    "state",
    "waiting",
    "writing",
]
