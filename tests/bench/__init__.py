# SPDX-License-Identifier: Apache-2.0
"""The benchmark: `python -m tests.bench`, or `make bench`.

Everything is measured twice in turn, over TCP/IP and bypassed, within seconds of each other, on
pinned CPUs. results.py holds what was measured, stats.py what follows from it, limits.py what was
promised; each kind of load is a module of its own: hops, streaming, meshes, churn, answers, others,
scale.
"""
