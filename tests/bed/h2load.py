"""HTTP/2 without TLS, gRPC-like: h2load, run in the client's pod as its application."""

from __future__ import annotations

import os
import re

from tests.bed.pod import APP_UID, Pod
from tests.bed.wrk import Load

_ANSWERS = re.compile(r"(\d+) total, .* (\d+) succeeded, (\d+) failed, (\d+) errored")


def run(
    pod: Pod, url: str, body: bytes, *, connections: int, seconds: float, cpus: str = "-"
) -> Load:
    """POST body over `connections` connections, one request at a time on each, for some seconds.

    Raises:
        RuntimeError: a request failed or was not answered with success.
    """
    message, log = pod.folder / "h2load-body", pod.folder / "h2load.log"
    message.write_bytes(body)
    log.write_bytes(b"")  # h2load appends
    for path in (message, log):
        os.chown(path, APP_UID, APP_UID)
    options = [
        "-t1",
        "-m1",
        f"-c{connections}",
        f"-D{seconds * 1000:.0f}ms",
        f"-d{message}",
        f"--log-file={log}",
    ]
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    out = pod.run(["h2load", *options, *headers, url], cpus=cpus, timeout_s=seconds + 30)
    answers = _ANSWERS.search(out)
    if answers is None or int(answers[3]) or int(answers[4]) or not int(answers[2]):
        raise RuntimeError(f"h2load in pod {pod.name}: answers without success\n{out}")
    latencies: dict[int, int] = {}
    for line in log.read_text().splitlines():
        _started, _status, us = map(int, line.split())
        latencies[us] = latencies.get(us, 0) + 1
    return Load(sum(latencies.values()), float(seconds), latencies)
