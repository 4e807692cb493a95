# SPDX-License-Identifier: Apache-2.0
"""Apache with its event MPM: static files, with sendfile and without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.apps import tools
from tests.apps.application import Application, Serve
from tests.apps.place import TWO_HOPS, Place
from tests.apps.tools import contract, wrk_of

CONFIG = """
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


def serve(sendfile: str) -> Serve:
    """Static files of the contract's sizes."""

    @contextmanager
    def running(place: Place) -> Iterator[None]:
        link = place.front
        folder = link.server.folder("apache")
        config = folder / "apache.conf"
        config.write_text(
            CONFIG.format(
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


LOADS = {"1 KB": wrk_of(1000), "1 MB": wrk_of(1_000_000, 2)}

APPLICATIONS = tuple(
    Application(
        name,
        f"Apache, EnableSendfile {switch}; wrk",
        reader="event loop",
        protocol="http",
        serve=serve(switch),
        check=contract("http.client"),
        loads=LOADS,
        hops=TWO_HOPS,
    )
    for name, switch in (("apache", "Off"), ("apache-sendfile", "On"))
)
