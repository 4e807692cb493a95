# SPDX-License-Identifier: Apache-2.0
"""Python: blocking sockets in two threads, WSGI and ASGI servers, HTTP clients, gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.apps import application, tools
from tests.apps.application import Application, Figures, Serve
from tests.apps.place import TWO_HOPS, Link, Place
from tests.apps.tools import PATIENCE_S, contract, requests_of, wrk_of

ECHO_BYTES = 20_000_000
ECHO_TIMES = 3


@contextmanager
def serve_echo(place: Place) -> Iterator[None]:
    """An echo with a thread per connection."""
    with place.front.serving(tools.python("echo_threads", "serve", place.front.listen_port)):
        yield


def _echo(place: Place, times: int) -> list[float]:
    link = place.front
    arguments = ("client", link.destination, link.port, ECHO_BYTES, times)
    argv = tools.python("echo_threads", *arguments)
    first, *taken = link.client.run(argv, timeout_s=PATIENCE_S).splitlines()
    assert first == f"right {times}", first
    return [float(line) for line in taken]


def check_echo(place: Place) -> None:
    """20 MB there and back at once, over fresh connections."""
    _echo(place, ECHO_TIMES)


def load_echo(place: Place, seconds: float) -> Figures:
    """20 MB there and back at once, again and again."""
    (once,) = _echo(place, 1)
    taken = _echo(place, max(3, round(seconds / once * 1e6)))
    return application.figures(taken, sum(taken) / 1e6, 2 * ECHO_BYTES)


@contextmanager
def serve_grpc(place: Place) -> Iterator[None]:
    """The echo service."""
    with place.front.serving(tools.python("grpc_echo", "serve", place.front.listen_port)):
        yield


def check_grpc(place: Place) -> None:
    """Unary and streamed messages of up to 4 MB."""
    argv = tools.python("grpc_echo", "check", place.front.address)
    said = place.front.client.run(argv, timeout_s=PATIENCE_S)
    assert said.startswith("checked "), said


def load_grpc(size: int) -> application.LoadRun:
    """Unary calls with messages of this size, one after the other."""

    def run(place: Place, seconds: float) -> Figures:
        argv = tools.python("grpc_echo", "load", place.front.address, seconds, size)
        said = place.front.client.run(argv, timeout_s=seconds + PATIENCE_S)
        return application.figures(map(float, said.split()), seconds, 2 * size)

    return run


def serve_http(
    command: Callable[[Link], list[str]],
) -> Serve:
    """A server of the WSGI or ASGI application."""

    @contextmanager
    def serve(place: Place) -> Iterator[None]:
        with place.front.serving(command(place.front)):
            yield

    return serve


def _module(name: str, *arguments: object) -> list[str]:
    return [*tools.PYTHON, "-m", name, *map(str, arguments)]


def _uvicorn(link: Link) -> list[str]:
    where = ("--host", "0.0.0.0", "--port", link.listen_port)
    return _module("uvicorn", *where, "--no-access-log", "tests.apps.programs.asgi:app")


def _gunicorn(*workers: object) -> Callable[[Link], list[str]]:
    def command(link: Link) -> list[str]:
        folder = link.server.folder("gunicorn")
        where = ("--bind", f"0.0.0.0:{link.listen_port}", "--worker-tmp-dir", folder)
        options = (*where, "--keep-alive", 60, "--no-control-socket", *workers)
        return _module("gunicorn", *options, "tests.apps.programs.wsgi:app")

    return command


def _granian(link: Link) -> list[str]:
    where = ("--host", "0.0.0.0", "--port", link.listen_port)
    options = ("--interface", "asgi", "--no-ws", "--no-log")
    return _module("granian", *where, *options, "tests.apps.programs.asgi:app")


GETS = (0, 1, 1000, 16_384, 65_537, 1_000_000, 3_000_000)
BOTH_WAYS = contract("http.client", gets=GETS, posts=tools.ECHOED)
SMALL_LOADS = {"1 KB": wrk_of(1000), "64 KB": wrk_of(65_537)}

APPLICATIONS = (
    Application(
        "python-blocking",
        "Python, an echo of 20 MB by two threads",
        reader="blocking",
        protocol="tcp",
        serve=serve_echo,
        check=check_echo,
        loads={"20 MB there and back": load_echo},
        advice="blocking sockets stay on TCP",
    ),
    Application(
        "grpc",
        "gRPC in Python, unary and streams",
        reader="event loop",
        protocol="http2",
        serve=serve_grpc,
        check=check_grpc,
        loads={"100 B": load_grpc(100), "64 KB": load_grpc(65_536), "1 MB": load_grpc(1_000_000)},
    ),
    Application(
        "uvicorn",
        "uvicorn; wrk",
        reader="event loop",
        protocol="http",
        serve=serve_http(_uvicorn),
        check=BOTH_WAYS,
        loads=SMALL_LOADS,
        hops=TWO_HOPS,
    ),
    Application(
        "granian",
        "granian; wrk",
        reader="event loop",
        protocol="http",
        serve=serve_http(_granian),
        check=BOTH_WAYS,
        loads=SMALL_LOADS,
        hops=TWO_HOPS,
    ),
    Application(
        "gunicorn",
        "gunicorn, sync workers; wrk",
        reader="blocking",
        protocol="http",
        serve=serve_http(_gunicorn("--workers", 2)),
        check=BOTH_WAYS,
        loads=SMALL_LOADS,
        advice="blocking workers stay on TCP",
        hops=TWO_HOPS,
    ),
    Application(
        "gunicorn-threads",
        "gunicorn, threads; wrk",
        reader="blocking",
        protocol="http",
        serve=serve_http(_gunicorn("--worker-class", "gthread", "--threads", 8)),
        check=BOTH_WAYS,
        loads=SMALL_LOADS,
        advice="blocking workers stay on TCP",
        hops=TWO_HOPS,
    ),
    Application(
        "requests",
        "Python's requests, a Go server",
        reader="blocking",
        protocol="http",
        serve=lambda place: tools.go_backend(place.front),
        check=contract("requests", posts=tools.ECHOED),
        loads={"1 KB": requests_of("requests", 1000)},
        advice="blocking clients stay on TCP",
        hops=TWO_HOPS,
    ),
    Application(
        "aiohttp",
        "Python's aiohttp, a Go server",
        reader="event loop",
        protocol="http",
        serve=lambda place: tools.go_backend(place.front),
        check=contract("aiohttp", posts=tools.ECHOED),
        loads={"1 KB": requests_of("aiohttp", 1000), "1 MB": requests_of("aiohttp", 1_000_000)},
        hops=TWO_HOPS,
    ),
)
