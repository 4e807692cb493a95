# SPDX-License-Identifier: Apache-2.0
"""A clean clone on bare machines of the distributions that README names."""
