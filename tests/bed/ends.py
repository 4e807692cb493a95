# SPDX-License-Identifier: Apache-2.0
"""Small C programs at the two ends of a hop: `PROGRAM serve ...` and what connects to it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bed.pingpong import Hop


HEADERS = Path(__file__).parent  # endpoint.h


def compiled(source: Path, folder: Path) -> Path:
    """Compile a program into folder and return its path."""
    program = folder / source.stem
    options = ["-O2", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{HEADERS}"]
    subprocess.run(["gcc", *options, "-o", program, source], check=True)
    return program


@contextmanager
def serving(
    program: Path, hop: Hop, cpus: str, *arguments: object
) -> Iterator[subprocess.Popen[str]]:
    """`PROGRAM serve ADDRESS PORT ARGUMENT...` in the hop's server, killed on leaving.

    Its standard output is a pipe, from which the line "ready" has been read.

    Raises:
        RuntimeError: it does not listen.
    """
    process = hop.server.spawn(
        [program, "serve", hop.listen, str(hop.listen_port), *map(str, arguments)],
        container=hop.server_container,
        cpus=cpus,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(f"{program.name} serve does not listen: {hop.server.logs()}")
        yield process
    finally:
        process.kill()
        process.wait()


def asked(program: Path, command: str, hop: Hop, cpus: str, *arguments: object) -> str:
    """What `PROGRAM COMMAND SOURCE ADDRESS PORT ARGUMENT...` printed in the hop's asker.

    Raises:
        RuntimeError: it failed; the message holds its output.
    """
    return hop.asker.run(
        [program, command, hop.source, hop.destination, str(hop.port), *map(str, arguments)],
        container=hop.asker_container,
        cpus=cpus,
    )
