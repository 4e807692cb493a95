# SPDX-License-Identifier: Apache-2.0
"""All applications, by name, in the order of the table."""

from __future__ import annotations

from tests.apps import (
    curl,
    go,
    haproxy,
    java,
    mariadb,
    memcached,
    mosquitto,
    nghttp2,
    nginx,
    node,
    php,
    pipes,
    postgres,
    python,
    redis,
    static,
    websocket,
)
from tests.apps.application import Application

MODULES = (
    *(redis, memcached, postgres, mariadb, nginx, haproxy, static, php, node, websocket, go, java),
    *(python, nghttp2, curl, mosquitto, pipes),
)
APPLICATIONS: dict[str, Application] = {
    each.name: each for module in MODULES for each in module.APPLICATIONS
}
