# SPDX-License-Identifier: Apache-2.0
"""The DaemonSet's image, built and tried without a container engine."""
