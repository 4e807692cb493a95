# SPDX-License-Identifier: Apache-2.0
"""`make setup-test`: a clean clone of HEAD on bare machines, so that no leftovers help it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.bed import signals
from tests.bed.bare import BareError, Log, bare_machine, base
from tests.bed.bed import REPOSITORY

STORE = REPOSITORY / "build" / "setup-test"
SUITES = {"12": "bookworm", "13": "trixie"}
SETUP = "make setup build lint"
STEPS = (
    ".venv/bin/tcpip-bypass-node selftest || test $? -eq 1",  # 1: this kernel allows less
    ".venv/bin/python -m tests.demo --runs 1",
    ".venv/bin/python -m pytest -q tests/unit",
)


def main() -> int:
    """Returns the exit status: 0 when every step went well on every machine, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m tests.bare", description=__doc__)
    parser.add_argument(
        "--debian", choices=SUITES, action="append", help="only this one; may be given twice"
    )
    parser.add_argument("--mirror", help="of Debian; default: this machine's own")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("It makes root folders and mounts them: run it as root.", file=sys.stderr)
        return 1
    signals.stop_at_first()
    STORE.mkdir(parents=True, exist_ok=True)
    try:
        failed = [
            number
            for number in arguments.debian or SUITES
            if not try_on(number, STORE / f"debian-{number}.log", arguments.mirror)
        ]
    except KeyboardInterrupt as interrupt:
        print(f"{interrupt}: stopped before everything was tried", file=sys.stderr)
        return 130
    return int(bool(failed))


def try_on(number: str, log: Path, mirror: str | None) -> bool:
    """Whether all steps went well on that Debian; what they printed is in the log.

    It takes long, so after one that fails the others are tried as well.
    """
    ill = False
    with log.open("wb") as output:
        said = Log(output, f"Debian {number}")
        try:
            below = base(STORE, SUITES[number], mirror, said)
            with bare_machine(STORE, below, SUITES[number], mirror, said) as machine:
                said.tell(SETUP)
                machine.run(SETUP)
                for step in STEPS:
                    said.tell(step)
                    try:
                        machine.run(step)
                    except BareError as error:
                        said.tell(f"FAILED: {error}")
                        ill = True
        except BareError as error:
            said.tell(f"FAILED: {error}")
            ill = True
        said.tell(f"all that was printed: {log}" if ill else "all is well")
    return not ill


if __name__ == "__main__":
    sys.exit(main())
