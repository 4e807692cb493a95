"""A request's whole way: client, its sidecar, the server's sidecar, nginx."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from tests.bed import envoy, nginx
from tests.bed.envoy import Sidecar, Tls
from tests.bed.pingpong import SERVICE_IP
from tests.bed.pod import Pod

SERVICE_URL = f"http://{SERVICE_IP}"


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
) -> Iterator[None]:
    """nginx in the server's pod and an Envoy in both; SERVICE_URL then leads from one to the other.

    sidecar says how the Envoys proxy; tls holds a certificate per pod name for mTLS between them.
    """
    model = sidecar or Sidecar(endpoint=None)
    tls = tls or {}
    sidecars = {
        client: replace(model, endpoint=server.ip, tls=tls.get(client.name)),
        server: replace(model, endpoint=None, tls=tls.get(server.name)),
    }
    with ExitStack() as stack:
        stack.enter_context(nginx.running(server, files, sendfile=sendfile, cpus=cpus))
        for pod, own in sidecars.items():
            stack.enter_context(envoy.running(pod, own, cpus))
        yield
