# SPDX-License-Identifier: Apache-2.0
"""Entry point of the frozen program and of ``python -m cni_plugin``."""

import sys

from cni_plugin.main import main

REFUSED = 3  # to start.c, which ends with 1 then: Python itself ends with 1 if it cannot start

code = main()
sys.exit(REFUSED if code and getattr(sys, "frozen", False) else code)
