# SPDX-License-Identifier: Apache-2.0
"""Node: http with connections that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps import tools
from tests.apps.application import Application
from tests.apps.place import Place
from tests.apps.tools import contract, requests_of, wrk_of


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """The contract's server."""
    with place.front.serving(tools.node("httpd.js", place.front.listen_port)):
        yield


APPLICATIONS = (
    Application(
        "node",
        "Node, http with keep-alive at both ends",
        reader="event loop",
        protocol="http",
        serve=serve,
        check=contract("node", posts=tools.ECHOED),
        loads={
            "1 KB": requests_of("node", 1000),
            "1 MB": requests_of("node", 1_000_000),
            "1 KB, wrk": wrk_of(1000),
        },
    ),
)
