# SPDX-License-Identifier: Apache-2.0
"""The agent: keeps one node as `install` and `load` have made it."""
