# SPDX-License-Identifier: Apache-2.0
"""Go: net/http at both ends, and TCP proxies by io.Copy, which splices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps import tools
from tests.apps.application import Application, Serve
from tests.apps.nginx import UP_AND_DOWN
from tests.apps.place import TWO_HOPS, Place
from tests.apps.tools import SMALL_FIRST, contract, requests_of, wrk_of


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """The contract's server."""
    with tools.go_backend(place.front):
        yield


def serve_copy(command: str) -> Serve:
    """The proxy, and the contract's server behind it."""

    @contextmanager
    def serve(place: Place) -> Iterator[None]:
        listen = f"0.0.0.0:{place.front.listen_port}"
        argv = [str(tools.go()), command, listen, place.back.address]
        with tools.go_backend(place.back), place.front.serving(argv):
            yield

    return serve


APPLICATIONS = (
    Application(
        "go",
        "Go, net/http at both ends",
        reader="event loop",
        protocol="http",
        serve=serve,
        check=contract("go", posts=tools.ECHOED),
        loads={
            "1 KB": requests_of("go", 1000),
            "1 MB": requests_of("go", 1_000_000),
            "1 KB, wrk": wrk_of(1000),
        },
    ),
    Application(
        "go-copy",
        "Go, a TCP proxy by io.Copy; wrk",
        reader="splice",
        protocol="http",
        serve=serve_copy("copy"),
        check=UP_AND_DOWN,
        loads={"1 KB": wrk_of(1000), "1 MB": wrk_of(1_000_000, 2)},
        advice="a proxy that splices stays on TCP",
    ),
    Application(
        "go-copy-header",
        "Go, a TCP proxy that reads headers, then io.Copy; wrk",
        reader="splice",
        protocol="http",
        serve=serve_copy("copy-header"),
        check=SMALL_FIRST,
        loads={"1 KB": wrk_of(1000)},
        hops=TWO_HOPS,
        advice="a proxy that splices stays on TCP",
    ),
)
