# SPDX-License-Identifier: Apache-2.0
"""The node program, and what puts everything onto a node."""
