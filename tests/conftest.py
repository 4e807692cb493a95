# SPDX-License-Identifier: Apache-2.0
"""What all tests share."""

from __future__ import annotations

import signal

from hypothesis import settings

# A job of nohup's ignores it, and so would each program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# By default an example must be done in 200 ms: no test asserts an absolute time.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
