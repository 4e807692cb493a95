# SPDX-License-Identifier: Apache-2.0
"""Unit tests, integration tests, the testbed they share, and the demo."""
