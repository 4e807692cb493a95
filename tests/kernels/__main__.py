# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.kernels [SERIES...]`: the suites on other kernels, and one table of them all.

A run of every series and suite that finds no problem writes docs/kernels.md.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import sys
import time

from tests.bed.apt import AptError
from tests.fuzz import settings
from tests.kernels import images, initramfs, machine, page, report
from tests.kernels.suites import (
    FUZZ_PROGRAM,
    PROJECT,
    SUITES,
    USUAL,
    WITH_PARAMETERS,
    Failed,
    Outcome,
    Suite,
)
from tests.passes import churn

FOLDER = PROJECT / "build/kernels"
INITRAMFS = FOLDER / "initramfs.cpio"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels", description=__doc__)
    parser.add_argument(
        "series", nargs="*", default=images.SERIES, help=f"default: {' '.join(images.SERIES)}"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--suite",
        action="append",
        choices=SUITES,
        help="only this one; may be given again; default: all but those for docs/design",
    )
    which.add_argument(
        "--page",
        action="store_true",
        help="only the suites that docs/kernels.md is made of; write it, of these series",
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="kernels at a time; default: %(default)s"
    )
    parser.add_argument(
        "--mirror", metavar="URL", help="a Debian archive; default: this machine's own"
    )
    return parser


def suites_on(kernel: images.Kernel, arguments: argparse.Namespace) -> list[Suite]:
    """What is to run on one kernel. With parameters the self-test says all that differs; on one
    that is too old, no program of the others loads."""
    usual = page.SUITES if arguments.page or kernel.is_too_old else USUAL
    wanted = arguments.suite or (WITH_PARAMETERS if kernel.parameters else usual)
    return [SUITES[name] for name in wanted]


async def run_all(
    qemu: images.Qemu, kernels: list[images.Kernel], arguments: argparse.Namespace
) -> list[machine.Run]:
    """All suites on all kernels, `--jobs` kernels at a time."""
    turns = asyncio.Semaphore(arguments.jobs)

    def tell(kernel: images.Kernel, outcome: Outcome) -> None:
        print(f"{kernel.title}: {outcome.suite} took {outcome.seconds:.0f} s", flush=True)

    guests = machine.Machine(qemu, INITRAMFS, tell)

    async def one(kernel: images.Kernel) -> machine.Run:
        async with turns:
            console = FOLDER / f"console-{kernel.series}.log"
            return await guests.run(kernel, suites_on(kernel, arguments), console)

    return list(await asyncio.gather(*(one(kernel) for kernel in kernels)))


def main() -> int:
    """The entry point; the exit status is 0 if every kernel is as its self-test says."""
    arguments = build_parser().parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run's downloads and initramfs are in use
        return prepare_and_run(arguments)


def prepare_and_run(arguments: argparse.Namespace) -> int:
    """Fetches what is missing, runs, and reports; returns the exit status."""
    try:
        kernels = images.get_kernels(FOLDER / "images", arguments.series, arguments.mirror)
        qemu = images.get_qemu(FOLDER, arguments.mirror)
    except AptError as error:
        print(f"test-kernels: {error}", file=sys.stderr)
        return 1
    settings.compiled(FUZZ_PROGRAM.parent)
    churn.compiled()
    initramfs.write(INITRAMFS, list({kernel.release: kernel for kernel in kernels}.values()))
    start = time.monotonic()
    try:
        runs = asyncio.run(run_all(qemu, kernels, arguments))
    except KeyboardInterrupt:
        return 130
    print(f"Kernels: {len(runs)}, in {time.monotonic() - start:.0f} s")
    return write_page(arguments, runs, report.show(runs))


def write_page(arguments: argparse.Namespace, runs: list[machine.Run], failures: int) -> int:
    """Writes docs/kernels.md if that is asked for or the run is whole and well; the exit status."""
    is_whole = not arguments.suite and tuple(arguments.series) == images.SERIES
    if not arguments.page and (failures or not is_whole):
        return failures
    try:
        page.PATH.write_text(page.written(runs), encoding="utf-8")
    except Failed as failure:
        print(f"test-kernels: {page.PATH} stays as it is: {failure}", file=sys.stderr)
        return failures or 1
    return failures


if __name__ == "__main__":
    sys.exit(main())
