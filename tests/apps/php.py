# SPDX-License-Identifier: Apache-2.0
"""PHP-FPM over TCP behind nginx."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.apps import nginx, tools
from tests.apps.application import Application
from tests.apps.place import TWO_HOPS, Place
from tests.apps.tools import contract, wrk_of

CONFIG = """
[global]
error_log = {folder}/error.log
daemonize = no
[www]
listen = 0.0.0.0:{port}
pm = static
pm.max_children = 4
php_admin_value[post_max_size] = 64M
php_admin_value[memory_limit] = 256M
"""
FASTCGI = """
        location / {{
            include /etc/nginx/fastcgi_params;
            fastcgi_param SCRIPT_FILENAME {script};
            fastcgi_pass {backend};
        }}
"""
GETS = (1, 1000, 16_384, 65_537, 1_000_000, 3_000_000)


def _program() -> Path:
    found = sorted(Path("/usr/sbin").glob("php-fpm*"))
    if not found:
        raise FileNotFoundError("no php-fpm in /usr/sbin; run `make setup`")
    return found[-1]


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """nginx that passes everything to PHP-FPM on the link behind it."""
    link = place.back
    folder = link.server.folder("php")
    config = folder / "php-fpm.conf"
    config.write_text(CONFIG.format(folder=folder, port=link.listen_port))
    config.chmod(0o644)
    server = FASTCGI.format(script=tools.PROGRAMS / "contract.php", backend=link.address)
    argv = [str(_program()), "-n", "-F", "-y", str(config)]
    with link.serving(argv), nginx.running(place.front, server):
        yield


APPLICATIONS = (
    Application(
        "php-fpm",
        "nginx and PHP-FPM over TCP; wrk",
        reader="blocking",
        fionread=True,
        protocol="http",
        serve=serve,
        check=contract("http.client", gets=GETS, posts=tools.ECHOED),
        loads={"1 KB": wrk_of(1000), "64 KB": wrk_of(65_537)},
        advice="nginx is bypassed to its clients; PHP's workers block and stay on TCP",
        hops=TWO_HOPS,
    ),
)
