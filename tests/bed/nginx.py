# SPDX-License-Identifier: Apache-2.0
"""The application: nginx, as an unprivileged user."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.bed.pingpong import APP_PORT
from tests.bed.pod import APP, Pod

READY_TIMEOUT_S = 60

# keepalive_requests: Envoy's pooled connections are to live as long as the run.
# sendfile: with it, header and body are two sends and wake Envoy twice, which costs more than
# everything this project saves.
ANSWER = "The answer of a small service, from memory: 200 bytes. ".ljust(200, ".")
CONFIG = """
daemon off;
master_process off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    tcp_nodelay on;
    keepalive_timeout 1h;
    keepalive_requests 1000000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    scgi_temp_path {folder}/scgi;
    uwsgi_temp_path {folder}/uwsgi;
    {http}
    server {{
        listen {listen};
        {server}
    }}
}}
"""
SERVER = """
        root {folder}/files;
        location = /answer {{ default_type text/plain; return 200 "{answer}"; }}
"""


def configured(folder: Path, *, listen: str, http: str, server: str) -> list[str]:
    """The command line, once nginx.conf is in `folder`; `http` and `server` go into these blocks.

    `listen` is an address as nginx has it, with its switches.
    """
    config = folder / "nginx.conf"
    config.write_text(CONFIG.format(folder=folder, listen=listen, http=http, server=server))
    config.chmod(0o644)
    return ["nginx", "-c", str(config), "-e", str(folder / "error.log")]


@contextmanager
def running(
    pod: Pod,
    files: Mapping[str, bytes],
    *,
    sendfile: bool = False,
    http2: bool = False,
    over: Path | None = None,
    cpus: str = "-",
) -> Iterator[None]:
    """nginx on the application's port, serving `files` by name, and ANSWER under /answer.

    With http2 it speaks that and nothing else, without TLS. over: a socket of AF_UNIX to listen on
    in place of the port.
    """
    folder = pod.folder / "nginx"
    (folder / "files").mkdir(parents=True, exist_ok=True)
    os.chown(folder, *pod.user_of(APP))
    for name, body in files.items():
        (folder / "files" / name).write_bytes(body)
        (folder / "files" / name).chmod(0o644)
    # One socket for both families, as Go, Java and Node listen.
    listen = f"[::]:{APP_PORT} ipv6only=off" if "v6" in pod.families else str(APP_PORT)
    if over is not None:
        listen = f"unix:{over}"
    if http2:
        listen += " http2"
    server = SERVER.format(folder=folder, answer=ANSWER)
    switch = f"sendfile {'on' if sendfile else 'off'};"
    argv = configured(folder, listen=listen, http=switch, server=server)
    process = pod.spawn(argv, cpus=cpus)
    try:
        _wait_listening(pod, process, over)
        yield
    finally:
        process.kill()
        process.wait()


def _wait_listening(pod: Pod, process: subprocess.Popen[str], over: Path | None) -> None:
    family = socket.AF_INET if over is None else socket.AF_UNIX
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        with pod.netns.entered(), socket.socket(family) as probe:
            if probe.connect_ex(("127.0.0.1", APP_PORT) if over is None else str(over)) == 0:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"nginx in pod {pod.name} does not listen:\n{pod.logs()}")
        time.sleep(0.02)
