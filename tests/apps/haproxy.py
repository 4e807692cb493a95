# SPDX-License-Identifier: Apache-2.0
"""HAProxy in front of a Go server: by splice(2), and by read and write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps import tools
from tests.apps.application import Application, Serve
from tests.apps.nginx import UP_AND_DOWN
from tests.apps.place import TWO_HOPS, Place
from tests.apps.tools import SMALL_FIRST, wrk_of

CONFIG = """
global
    nbthread 1
    maxconn 2000
defaults
    mode {mode}
    {option}
    timeout connect 5s
    timeout client 1h
    timeout server 1h
frontend front
    bind 0.0.0.0:{port}
    default_backend back
backend back
    server one {backend}
"""


def serve(mode: str, option: str = "") -> Serve:
    """HAProxy in this mode with this option."""

    @contextmanager
    def running(place: Place) -> Iterator[None]:
        link = place.front
        config = link.server.folder("haproxy") / "haproxy.cfg"
        config.write_text(
            CONFIG.format(
                mode=mode, option=option, port=link.listen_port, backend=place.back.address
            )
        )
        config.chmod(0o644)
        with tools.go_backend(place.back), link.serving(["haproxy", "-db", "-f", config]):
            yield

    return running


def check_both_orders(place: Place) -> None:
    """Large bodies on a new connection, and on one that has had small answers by recv."""
    UP_AND_DOWN(place)
    SMALL_FIRST(place)


SPLICE = "option splice-request\n    option splice-response"
LOADS = {"1 KB": wrk_of(1000), "1 MB": wrk_of(1_000_000, 2)}

APPLICATIONS = (
    Application(
        "haproxy",
        "HAProxy, mode http; wrk",
        reader="event loop",
        protocol="http",
        serve=serve("http"),
        check=UP_AND_DOWN,
        loads=LOADS,
        hops=TWO_HOPS,
    ),
    Application(
        "haproxy-splice",
        "HAProxy, mode tcp, splice-request and splice-response; wrk",
        reader="splice",
        protocol="http",
        serve=serve("tcp", SPLICE),
        check=UP_AND_DOWN,
        loads=LOADS,
        advice="a proxy that splices stays on TCP",
    ),
    Application(
        "haproxy-splice-auto",
        "HAProxy, mode tcp, splice-auto; wrk",
        reader="splice",
        protocol="http",
        serve=serve("tcp", "option splice-auto"),
        check=check_both_orders,
        loads=LOADS,
        advice="a proxy that splices stays on TCP",
        hops=TWO_HOPS,
    ),
    Application(
        "haproxy-splice-late",
        "HAProxy, mode http, splice-request and splice-response; wrk",
        reader="splice",
        protocol="http",
        serve=serve("http", SPLICE),
        check=check_both_orders,
        loads=LOADS,
        advice="a proxy that splices stays on TCP",
        hops=TWO_HOPS,
    ),
)
