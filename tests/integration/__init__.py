# SPDX-License-Identifier: Apache-2.0
"""Tests on real namespaces, cgroups, BPF programs and proxies; they need root."""
