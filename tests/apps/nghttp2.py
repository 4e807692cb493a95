# SPDX-License-Identifier: Apache-2.0
"""HTTP/2 without TLS: nghttpd and h2load, nghttp for every byte."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps import application, tools
from tests.apps.application import Application, Figures, LoadRun
from tests.apps.place import TWO_HOPS, Place
from tests.apps.programs.contract import compare, pattern

CONNECTIONS = 4
STREAMS = 4
_ANSWERS = re.compile(r"(\d+) total, .* (\d+) succeeded, (\d+) failed, (\d+) errored")


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """Static files of the contract's sizes."""
    root = tools.files(place.front.server)
    with place.front.serving(["nghttpd", "--no-tls", "-d", root, str(place.front.listen_port)]):
        yield


def load(size: int) -> LoadRun:
    """h2load, several streams on each connection."""

    def run(place: Place, seconds: float) -> Figures:
        client = place.front.client
        log = client.folder("h2load") / "log"
        log.write_bytes(b"")  # h2load appends
        client.give(log)
        amount = ["-t1", f"-c{CONNECTIONS}", f"-m{STREAMS}", f"-D{seconds * 1000:.0f}ms"]
        url = f"{place.front.url}/bytes/{size}"
        out = client.run(["h2load", *amount, f"--log-file={log}", url], timeout_s=seconds + 30)
        answers = _ANSWERS.search(out)
        assert answers, out
        assert answers[3] == answers[4] == "0", out
        taken = [float(line.split()[2]) for line in log.read_text().splitlines()]
        return application.figures(taken, seconds, size)

    return run


def check(place: Place) -> None:
    """Each of the sizes, then loads of many streams; of the small answers some bypass."""
    client, folder = place.front.client, place.front.client.folder("nghttp")
    for size in tools.SIZES[1:]:
        command = f"nghttp {place.front.url}/bytes/{size} > {folder}/got"
        client.run(["sh", "-c", command], timeout_s=tools.PATIENCE_S)
        compare((folder / "got").read_bytes(), pattern(size))
    for size in (1000, 65_537):
        assert load(size)(place, 0.5).requests > 0


APPLICATIONS = (
    Application(
        "nghttpd",
        "nghttpd, h2load",
        reader="event loop",
        protocol="http2",
        serve=serve,
        check=check,
        loads={"1 KB": load(1000), "64 KB": load(65_537)},
        hops=TWO_HOPS,
    ),
)
