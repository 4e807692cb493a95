# SPDX-License-Identifier: Apache-2.0
"""curl: files of all sizes, down and up."""

from __future__ import annotations

from pathlib import Path

from tests.apps import application, tools
from tests.apps.application import Application, Figures
from tests.apps.place import TWO_HOPS, End, Place
from tests.apps.programs.contract import compare, pattern
from tests.apps.tools import PATIENCE_S, SIZES

UPLOADS = (1, 1000, 65_537, 10_000_000)
LOAD_BYTES = 20_000_000


def check(place: Place) -> None:
    """Files down on one connection, then up on one each."""
    check_downloads(place)
    check_uploads(place)


def check_downloads(place: Place) -> None:
    """Each of the contract's sizes, twice."""
    client, folder = place.front.client, place.front.client.folder("curl")
    wanted = SIZES * 2
    argv = ["curl", "-sSf"]
    for number, size in enumerate(wanted):
        argv += ["-o", str(folder / str(number)), f"{place.front.url}/bytes/{size}"]
    client.run(argv, timeout_s=PATIENCE_S)
    for number, size in enumerate(wanted):
        compare((folder / str(number)).read_bytes(), pattern(size))


def _file(end: End, size: int) -> Path:
    path = end.folder("curl") / f"up-{size}"
    path.write_bytes(pattern(size))
    path.chmod(0o644)
    return path


def check_uploads(place: Place) -> None:
    """Posted and put; what comes back is the same."""
    client = place.front.client
    for size in UPLOADS:
        path = _file(client, size)
        out = path.with_name("echo")
        for how in (["--data-binary", f"@{path}"], ["-T", str(path)]):
            argv = ["curl", "-sSf", "-o", str(out), *how, f"{place.front.url}/echo"]
            client.run(argv, timeout_s=PATIENCE_S)
            compare(out.read_bytes(), pattern(size))


def load_uploads(place: Place, seconds: float) -> Figures:
    """A large file put again and again, on one connection."""
    path = _file(place.front.client, LOAD_BYTES)

    def put(times: int) -> list[float]:
        argv = ["curl", "-sSf", "-w", "%{stderr}%{time_total}\\n", "-H", "Expect:"]
        for _ in range(times):
            argv += ["-T", str(path), "-o", "/dev/null", f"{place.front.url}/sink"]
        said = place.front.client.run(["sh", "-c", '"$@" 2>&1', "sh", *argv], timeout_s=120)
        return [float(line) * 1e6 for line in said.split()]

    (once,) = put(1)
    taken = put(max(3, round(seconds / once * 1e6)))
    return application.figures(taken, sum(taken) / 1e6, LOAD_BYTES)


APPLICATIONS = (
    Application(
        "curl",
        "curl, downloads and uploads, a Go server",
        reader="event loop",
        protocol="http",
        serve=lambda place: tools.go_backend(place.front),
        check=check,
        loads={"20 MB up": load_uploads},
        lasting=False,
        hops=TWO_HOPS,
    ),
)
