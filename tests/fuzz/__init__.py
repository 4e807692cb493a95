# SPDX-License-Identifier: Apache-2.0
"""The stream fuzzer: random traffic in both directions, every byte compared with what it must be.

`stream.c` makes the traffic, `settings.py` says where it runs (one cgroup on loopback, or the hops
between two pods), `engine.py` switches the bypass on and off under it and reads what it tells.
"""
