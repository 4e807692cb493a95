# SPDX-License-Identifier: Apache-2.0
"""`tcpip-bypass-node load` for a bed: this kernel is tried once a boot, not for each bed.

The self-test takes longer than all else that a bed needs. Its verdict is kept below build/.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest import mock

from install.program import cli, freshness, selftest
from install.program.selftest import Check, Verdict

BUILD = Path(__file__).parents[2] / "build"


def kept(mends: bool) -> Path:
    """Where the verdict on this kernel by these sources is."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return BUILD / "verdicts" / f"{boot}-{freshness.version()[:16]}-{mends}.json"


def remembered(*, mends: bool = True) -> Verdict:
    """As selftest.run(), which is asked unless it has told all before."""
    path = kept(mends)
    if path.exists():
        found = json.loads(path.read_bytes())
        checks = [Check(**each) for each in found["checks"]]
        return Verdict(found["mode"], found["reasons"], checks, found["mended"])
    verdict = asked(mends=mends)
    if verdict.is_final:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(f".{os.getpid()}")
        staged.write_text(json.dumps(verdict.as_json()))
        staged.rename(path)
    return verdict


asked = selftest.run

if __name__ == "__main__":
    with mock.patch.object(selftest, "run", remembered):
        sys.exit(cli.main())
