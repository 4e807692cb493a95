"""All applications, by name, in the order of the table."""

from __future__ import annotations

from tests.apps import go, haproxy, java, nginx, node, postgres, python, redis
from tests.apps.application import Application

MODULES = (redis, nginx, haproxy, postgres, go, node, java, python)
APPLICATIONS: dict[str, Application] = {
    each.name: each for module in MODULES for each in module.APPLICATIONS
}
