# SPDX-License-Identifier: Apache-2.0
"""Our plugin under a real containerd, with real sandboxes, driven as kubelet drives it."""
