"""What all tests share."""

from __future__ import annotations

import signal

from hypothesis import settings

# A job of nohup's ignores it, and so would each program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Hypothesis fails an example that takes longer than 200 ms, which says more of the machine.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
