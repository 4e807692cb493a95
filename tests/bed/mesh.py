# SPDX-License-Identifier: Apache-2.0
"""A request's whole way: client, its sidecar, the server's sidecar, nginx."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from tests.bed import addresses, envoy, fetch, nginx
from tests.bed.addresses import Family
from tests.bed.envoy import Sidecar, Tls
from tests.bed.pingpong import SERVICE_IP
from tests.bed.pod import Pod

SERVICE_URL = f"http://{SERVICE_IP}"
WARM_UP = 2000  # requests, in which the joiner makes some passes over both pods


def service_url(family: Family) -> str:
    """Where the service is, in a family."""
    return f"http://{addresses.url_host(addresses.OF[family].service)}"


def fetch_argv(sizes: Sequence[int], times: int, url: str = SERVICE_URL) -> list[str]:
    """The program that fetches `body-SIZE` of all sizes, so many times each, and checks them.

    First it fetches the smallest so often that its connections have joined.
    """
    paths = [f"body-{size}={size}" for size in sizes]
    return [
        sys.executable,
        fetch.__file__,
        url,
        str(times),
        *paths[:1] * (WARM_UP // times),
        *paths,
    ]


def fetched(sizes: Sequence[int], times: int) -> str:
    """What that program says when all is well."""
    return f"fetched {WARM_UP // times * times + times * len(sizes)}\n"


@contextmanager
def running(
    client: Pod,
    server: Pod,
    files: Mapping[str, bytes],
    *,
    sidecar: Sidecar | None = None,
    tls: Mapping[str, Tls] | None = None,
    sendfile: bool = False,
    cpus: str = "-",
    family: Family = "v4",
) -> Iterator[None]:
    """nginx in the server's pod and an Envoy in both; SERVICE_URL then leads from one to the other.

    family is that of the connection between the Envoys; service_url() says what the client speaks.
    sidecar says how the Envoys proxy; tls holds a certificate per pod name for mTLS between them.
    """
    model = sidecar or Sidecar(endpoint=None)
    tls = tls or {}
    sidecars = {
        client: replace(model, endpoint=server.address(family), tls=tls.get(client.name)),
        server: replace(model, endpoint=None, tls=tls.get(server.name)),
    }
    with ExitStack() as stack:
        http2 = model.protocol == "http2"
        stack.enter_context(nginx.running(server, files, sendfile=sendfile, http2=http2, cpus=cpus))
        for pod, own in sidecars.items():
            stack.enter_context(envoy.running(pod, own, cpus))
        yield


@contextmanager
def running_over_unix(
    client: Pod, server: Pod, files: Mapping[str, bytes], folder: Path, *, cpus: str = "-"
) -> Iterator[Path]:
    """The same three hops over AF_UNIX, and the socket that leads from one end to the other.

    folder: new, for the sockets.
    """
    folder.mkdir()
    folder.chmod(0o777)
    outbound, between, inbound = (folder / name for name in ("outbound", "between", "inbound"))
    with (
        nginx.running(server, files, over=inbound, cpus=cpus),
        envoy.running_over_unix(server, between, inbound, cpus),
        envoy.running_over_unix(client, outbound, between, cpus),
    ):
        yield outbound
