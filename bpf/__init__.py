# SPDX-License-Identifier: Apache-2.0
"""The data path: BPF programs in C, and how they are compiled, loaded and read."""
