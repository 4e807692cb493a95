# SPDX-License-Identifier: Apache-2.0
"""Tests that need no root and no BPF."""
