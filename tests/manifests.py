# SPDX-License-Identifier: Apache-2.0
"""The manifests as kubectl would apply them, overlays included.

Of kustomize, only what the overlays use: `resources` that are files or folders, and `patches` that
are strategic merges, with objects of these lists merged by their key. Anything else is an error, so
that an overlay that needs more is not half applied here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.bed.bed import REPOSITORY

Json = dict[str, Any]

INSTALL = REPOSITORY / "install"
DAEMONSET = INSTALL / "daemonset.yaml"
UNINSTALL = INSTALL / "uninstall.yaml"
OVERLAYS = INSTALL / "overlays"

# patchMergeKey in the Kubernetes API's types; a list that is not here is replaced as a whole.
_MERGE_KEYS = {"containers": "name", "volumes": "name", "volumeMounts": "mountPath", "env": "name"}
_KNOWN = {"apiVersion", "kind", "resources", "patches"}


def documents(path: Path) -> list[Json]:
    """Every object in a file of YAML."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def kustomized(folder: Path) -> list[Json]:
    """What `kubectl kustomize` makes of an overlay."""
    (kustomization,) = documents(folder / "kustomization.yaml")
    if unknown := kustomization.keys() - _KNOWN:
        raise ValueError(f"{folder}: kustomize may do {unknown}, this does not")
    objects: list[Json] = []
    for resource in kustomization["resources"]:
        path = folder / resource
        objects += kustomized(path) if path.is_dir() else documents(path)
    for patch in kustomization.get("patches", ()):
        matching = [each for each in objects if patch["target"] == {"kind": each["kind"]}]
        if not matching:
            raise ValueError(f"{folder}: nothing is {patch['target']}")
        change = yaml.safe_load(patch["patch"])
        objects = [merged(each, change) if each in matching else each for each in objects]
    return objects


def merged(old: Json, change: Json) -> Json:
    """A strategic merge: objects key by key, null removes, lists of _MERGE_KEYS by that key."""
    result = dict(old)
    for key, value in change.items():
        before = result.get(key)
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(before, dict):
            result[key] = merged(before, value)
        elif key in _MERGE_KEYS and isinstance(before, list):
            result[key] = _merged_lists(before, value, _MERGE_KEYS[key])
        else:
            result[key] = value
    return result


def _merged_lists(old: list[Json], change: list[Json], key: str) -> list[Json]:
    changes = {each[key]: each for each in change}
    kept = [merged(each, changes.pop(each[key], {})) for each in old]
    return [*kept, *changes.values()]


def daemonset(objects: list[Json]) -> Json:
    """The one DaemonSet among them."""
    (found,) = [each for each in objects if each["kind"] == "DaemonSet"]
    return found


def pod_spec(objects: list[Json]) -> Json:
    """The specification of its pods."""
    spec: Json = daemonset(objects)["spec"]["template"]["spec"]
    return spec


def agent(objects: list[Json]) -> Json:
    """The pods' one container."""
    (container,) = pod_spec(objects)["containers"]
    found: Json = container
    return found


def arguments(objects: list[Json]) -> list[str]:
    """What that container is started with."""
    namespace = daemonset(objects)["metadata"]["namespace"]
    return [each.replace("$(NAMESPACE)", namespace) for each in agent(objects)["args"]]


def capabilities(objects: list[Json]) -> frozenset[str]:
    """What the container may do, without the prefix CAP_; it drops all others."""
    granted = agent(objects)["securityContext"]["capabilities"]
    assert granted["drop"] == ["ALL"]
    return frozenset(granted["add"])
