# SPDX-License-Identifier: Apache-2.0
"""The demo: `python -m tests.demo`."""
