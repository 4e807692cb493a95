# SPDX-License-Identifier: Apache-2.0
"""Other kernels: boots each under QEMU and runs the tests that this machine runs on its own."""
