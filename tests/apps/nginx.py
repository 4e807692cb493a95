# SPDX-License-Identifier: Apache-2.0
"""nginx: static files with sendfile, and proxy_pass in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps import tools
from tests.apps.application import Application, Serve
from tests.apps.place import TWO_HOPS, Link, Place
from tests.apps.tools import SIZES, contract, wrk_of
from tests.bed import nginx

HTTP = """
    default_type application/octet-stream;
    sendfile on;
    client_max_body_size 0;
"""
PROXY = """
        location / {{
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_read_timeout 30s;
            {buffering}
        }}
"""
UNBUFFERED = "proxy_buffering off; proxy_request_buffering off;"


@contextmanager
def running(link: Link, server: str, http: str = "", switches: str = "") -> Iterator[None]:
    """nginx on the link, with these parts of its configuration."""
    folder, listen = link.server.folder("nginx"), f"{link.listen_port}{switches}"
    argv = nginx.configured(folder, listen=listen, http=f"{HTTP}    {http}", server=server)
    with link.serving(argv):
        yield


@contextmanager
def serve_files(place: Place) -> Iterator[None]:
    """Static files of the contract's sizes."""
    root = tools.files(place.front.server)
    with running(place.front, f"root {root};"):
        yield


@contextmanager
def serve_tls(place: Place) -> Iterator[None]:
    """The same over TLS, with a certificate of its own."""
    end = place.front.server
    root, folder = tools.files(end), end.folder("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    subject = ["-subj", "/CN=app", "-keyout", str(key), "-out", str(certificate)]
    end.run(["openssl", *new, *subject])
    server = f"root {root}; ssl_certificate {certificate}; ssl_certificate_key {key};"
    with running(place.front, server, switches=" ssl"):
        yield


def serve_proxy(buffering: str) -> Serve:
    """proxy_pass to the contract's Go server, over connections that are kept."""

    @contextmanager
    def serve(place: Place) -> Iterator[None]:
        upstream = f"upstream backend {{ server {place.back.address}; keepalive 16; }}"
        server = PROXY.format(buffering=buffering)
        with tools.go_backend(place.back), running(place.front, server, upstream):
            yield

    return serve


UP_AND_DOWN = contract("http.client", gets=(*SIZES, 30_000_000), posts=(*tools.ECHOED, 10_000_000))

APPLICATIONS = (
    Application(
        "nginx",
        "nginx, static files with sendfile; wrk",
        reader="event loop",
        protocol="http",
        serve=serve_files,
        check=contract("http.client"),
        loads={
            "1 KB": wrk_of(1000),
            "1 KB, a connection each": wrk_of(1000, is_fresh=True),
            "64 KB": wrk_of(65_537),
            "1 MB": wrk_of(1_000_000),
            "10 MB": wrk_of(10_000_000, 2),
        },
    ),
    Application(
        "nginx-tls",
        "nginx, TLS by OpenSSL; wrk",
        reader="event loop",
        protocol="tcp",
        serve=serve_tls,
        check=contract("http.client", scheme="https"),
        loads={
            "1 KB": wrk_of(1000, scheme="https"),
            "1 MB": wrk_of(1_000_000, 2, scheme="https"),
        },
        hops=TWO_HOPS,
    ),
    Application(
        "nginx-proxy",
        "nginx, proxy_pass to a Go server; wrk",
        reader="event loop",
        fionread=True,
        protocol="http",
        serve=serve_proxy(""),
        check=UP_AND_DOWN,
        loads={"1 KB": wrk_of(1000), "1 MB": wrk_of(1_000_000, 2)},
    ),
    Application(
        "nginx-unbuffered",
        "nginx, proxy_pass without buffering to a Go server; wrk",
        reader="event loop",
        fionread=True,
        protocol="http",
        serve=serve_proxy(UNBUFFERED),
        check=UP_AND_DOWN,
        loads={"1 KB": wrk_of(1000), "1 MB": wrk_of(1_000_000, 2)},
        hops=TWO_HOPS,
    ),
)
