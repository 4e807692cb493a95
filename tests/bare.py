# SPDX-License-Identifier: Apache-2.0
"""`make setup-test`: a clean clone of HEAD on bare machines, so that no leftovers help it."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
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
README = REPOSITORY / "README.md"
CONFLIST = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}]}
WATCHED_S = 10


def by_hand() -> list[str]:
    """The commands of the README's block "By hand", in order, without their comments."""
    block = README.read_text().partition("\nBy hand:\n\n")[2].splitlines()
    lines = itertools.takewhile(lambda line: line.startswith("    "), block)
    return [re.sub(r"\s+# .*", "", line).strip() for line in lines]


def script(commands: Sequence[str]) -> str:
    """These commands in one shell, on a node that has a network configuration and no runtime."""
    conflist = shlex.quote(json.dumps(CONFLIST))
    made = f"mkdir -p /etc/cni/net.d; echo {conflist} >/etc/cni/net.d/10-pods.conflist"
    return "\n".join(["set -ex", made, *map(_expected, commands)])


def _expected(command: str) -> str:
    """The command in a shell that ends when the command does not do what it should there."""
    _, *words = command.rstrip("& ").split()
    if words[:1] in (["check"], ["status"]) and "--watch" not in words:
        return f"{command} || test $? -eq 1"  # this kernel allows less, and there is no runtime
    if words[:1] == ["gc"]:
        return f"said=$({command} 2>&1) || echo \"$said\" | grep 'no container runtime'"
    if "--watch" in words:
        stopped = f"timeout --foreground --preserve-status -s INT {WATCHED_S} {command}"
        return f"script -qec {shlex.quote(stopped)} /dev/null"
    return command


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
                for step in (*STEPS, script(by_hand())):
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
