# SPDX-License-Identifier: Apache-2.0
"""Static files: Apache with its event MPM, with sendfile and without; lighttpd."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps import tools
from tests.apps.application import Application, Serve
from tests.apps.place import TWO_HOPS, Place
from tests.apps.tools import SIZES, contract, wrk_of

APACHE = """
ServerRoot {folder}
ServerName app
PidFile {folder}/pid
DefaultRuntimeDir {folder}
ErrorLog {folder}/error.log
Listen 0.0.0.0:{port}
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
StartServers 1
ServerLimit 1
ThreadsPerChild 25
MaxRequestWorkers 25
KeepAlive On
KeepAliveTimeout 3600
MaxKeepAliveRequests 0
EnableSendfile {sendfile}
EnableMMAP Off
DocumentRoot {root}
"""
LIGHTTPD = """
server.bind = "0.0.0.0"
server.port = {port}
server.document-root = "{root}"
server.max-keep-alive-requests = 65535
server.max-keep-alive-idle = 3600
"""
LIGHTTPD_SIZES = (*SIZES, 100_000)


def serve_apache(sendfile: str) -> Serve:
    """Static files of the contract's sizes."""

    @contextmanager
    def running(place: Place) -> Iterator[None]:
        link = place.front
        folder = link.server.folder("apache")
        config = folder / "apache.conf"
        config.write_text(
            APACHE.format(
                folder=folder,
                port=link.listen_port,
                sendfile=sendfile,
                root=tools.files(link.server),
            )
        )
        config.chmod(0o644)
        with link.serving(["apache2", "-f", config, "-DFOREGROUND"]):
            yield

    return running


@contextmanager
def serve_lighttpd(place: Place) -> Iterator[None]:
    """Static files of the contract's sizes and of its loads'."""
    link = place.front
    config = link.server.folder("lighttpd") / "lighttpd.conf"
    root = tools.files(link.server, LIGHTTPD_SIZES)
    config.write_text(LIGHTTPD.format(port=link.listen_port, root=root))
    config.chmod(0o644)
    with link.serving(["lighttpd", "-D", "-f", config]):
        yield


LOADS = {"1 KB": wrk_of(1000), "1 MB": wrk_of(1_000_000, 2)}

APPLICATIONS = (
    *(
        Application(
            name,
            f"Apache, EnableSendfile {switch}; wrk",
            reader="event loop",
            protocol="http",
            serve=serve_apache(switch),
            check=contract("http.client"),
            loads=LOADS,
            hops=TWO_HOPS,
        )
        for name, switch in (("apache", "Off"), ("apache-sendfile", "On"))
    ),
    Application(
        "lighttpd",
        "lighttpd; wrk",
        reader="event loop",
        protocol="http",
        serve=serve_lighttpd,
        check=contract("http.client", gets=LIGHTTPD_SIZES),
        loads={"1 KB": wrk_of(1000), "16 KB": wrk_of(16_384), "100 KB": wrk_of(100_000)},
        hops=TWO_HOPS,
    ),
)
