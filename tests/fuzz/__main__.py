# SPDX-License-Identifier: Apache-2.0
"""python -m tests.fuzz: random traffic over the bypass, every byte checked."""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
from pathlib import Path

from tests.fuzz import engine, settings
from tests.fuzz.engine import Options


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32))
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument(
        "--hops",
        default=settings.LOOPBACK,
        help=f"loopback (the default), or some of {', '.join(settings.WAYS)}, or all",
    )
    parser.add_argument("--at-once", type=int, default=48, help="connections on each hop")
    parser.add_argument("--kills", type=int, default=40, help="kill -9 per 100 s and end")
    parser.add_argument("--pause-flips", action="store_true", help="pause and resume all the time")
    parser.add_argument("--leave-flips", action="store_true", help="take all out, again and again")
    parser.add_argument("--reload", type=float, default=0, metavar="S", help="load anew every S s")
    parser.add_argument("--first", type=int, default=0, help="number of the first connection")
    parser.add_argument("--count", type=int, default=0, help="how many (default: time decides)")
    parser.add_argument("--program", type=Path, help="a stream program compiled before")
    arguments = parser.parse_args()
    options = Options(
        seed=arguments.seed,
        seconds=arguments.seconds,
        at_once=arguments.at_once,
        kills=arguments.kills,
        pause_flips=arguments.pause_flips,
        leave_flips=arguments.leave_flips,
        reload_every_s=arguments.reload,
        first=arguments.first,
        count=arguments.count,
    )
    wanted = list(settings.WAYS) if arguments.hops == "all" else arguments.hops.split(",")
    hops = [hop for hop in wanted if hop in settings.WAYS]
    if wanted != [settings.LOOPBACK] and len(hops) != len(wanted):
        parser.error(f"--hops {arguments.hops}: loopback, or some of {', '.join(settings.WAYS)}")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)  # the pods' users run the program from there
        program = arguments.program or settings.compiled(folder)
        place: settings.Setting
        if hops:
            place = stack.enter_context(settings.pods(hops))
        else:
            place = stack.enter_context(settings.loopback())
        report = engine.run(program, place, options)
    print(report.as_json())
    return 1 if report.bad else 0


if __name__ == "__main__":
    sys.exit(main())
