# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.kernels.memlock`: whether `load` needs CAP_SYS_RESOURCE here, as JSON.

Under the agent's capabilities and a container's RLIMIT_MEMLOCK. Before Linux 5.11 all maps were
counted under that limit, and only this capability lifts it.
"""

from __future__ import annotations

import json
import subprocess
import sys

from tests import capabilities, manifests
from tests.bed.node import PROGRAM

MEMLOCK = 8 * 2**20  # bytes: systemd's DefaultLimitMEMLOCK, which container runtimes pass on


def loads(names: frozenset[str]) -> bool:
    """Whether `load` works with these capabilities; what it says goes to stderr."""
    prlimit = ["prlimit", f"--memlock={MEMLOCK}:{MEMLOCK}", "--"]
    limited = [*prlimit, *capabilities.with_only(names)]
    done = subprocess.run([*limited, str(PROGRAM), "load"], stdout=sys.stderr, check=False)
    subprocess.run([PROGRAM, "unload"], stdout=sys.stderr, check=True)
    return done.returncode == 0


def main() -> None:
    granted = manifests.capabilities(manifests.documents(manifests.DAEMONSET))
    found = {"with": loads(granted), "without": loads(granted - {"SYS_RESOURCE"})}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
