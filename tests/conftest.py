"""What all tests share."""

from __future__ import annotations

import signal

# A job of nohup's ignores it, and so would each program that a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
