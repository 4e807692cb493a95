# SPDX-License-Identifier: Apache-2.0
"""Entry point of the frozen program and of ``python -m cni_plugin``."""

import sys

from cni_plugin.main import main

sys.exit(main())
