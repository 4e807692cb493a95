# SPDX-License-Identifier: Apache-2.0
"""`check`: whether a node is fit for the bypass, whether it is well, and what to do if not."""
