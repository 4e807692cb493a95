# SPDX-License-Identifier: Apache-2.0
"""h2load, run in the client's pod as its application: HTTP/2 without TLS, gRPC-like; HTTP/1.1."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tests.bed.pod import APP, Pod
from tests.bed.wrk import Load

_ANSWERS = re.compile(r"(\d+) total, .* (\d+) succeeded, (\d+) failed, (\d+) errored")


def post(
    pod: Pod, url: str, body: bytes, *, connections: int, seconds: float, cpus: str = "-"
) -> Load:
    """POST body as gRPC does, one request at a time on each connection, for some seconds.

    Raises:
        RuntimeError: a request failed or was not answered with success.
    """
    message = pod.folder / "h2load-body"
    message.write_bytes(body)
    os.chown(message, *pod.user_of(APP))
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    return _run(pod, ["-m1", f"-d{message}", *headers, url], connections, seconds, cpus)


def get(
    pod: Pod,
    url: str,
    *,
    connections: int,
    seconds: float,
    cpus: str = "-",
    over: Path | None = None,
) -> Load:
    """GET url by HTTP/1.1, one request at a time on each connection, for some seconds.

    over: a socket of AF_UNIX to connect to in place of the url's host.

    Raises:
        RuntimeError: a request failed or was not answered with success.
    """
    where = [] if over is None else [f"--base-uri=unix:{over}"]
    return _run(pod, ["--h1", *where, url], connections, seconds, cpus)


def _run(pod: Pod, arguments: Sequence[str], connections: int, seconds: float, cpus: str) -> Load:
    log = pod.folder / "h2load.log"
    log.write_bytes(b"")  # h2load appends
    os.chown(log, *pod.user_of(APP))
    options = ["-t1", f"-c{connections}", f"-D{seconds * 1000:.0f}ms", f"--log-file={log}"]
    out = pod.run(["h2load", *options, *arguments], cpus=cpus, timeout_s=seconds + 30)
    answers = _ANSWERS.search(out)
    if answers is None or int(answers[3]) or int(answers[4]) or not int(answers[2]):
        raise RuntimeError(f"h2load in pod {pod.name}: answers without success\n{out}")
    latencies: dict[int, int] = {}
    for line in log.read_text().splitlines():
        _started, _status, us = map(int, line.split())
        latencies[us] = latencies.get(us, 0) + 1
    return Load(sum(latencies.values()), float(seconds), latencies)
