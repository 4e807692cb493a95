# SPDX-License-Identifier: Apache-2.0
"""The manifests as helm and kubectl make them: the chart, and what is rendered from it.

`python -m tests.manifests` renders (tests/manifests/render.py); the tests hold the files to it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.bed.bed import REPOSITORY

Json = dict[str, Any]

INSTALL = REPOSITORY / "install"
CHART = INSTALL / "chart"
DAEMONSET = INSTALL / "daemonset.yaml"
UNINSTALL = INSTALL / "uninstall.yaml"
MONITORING = INSTALL / "monitoring.yaml"
ESTIMATE = INSTALL / "estimate.yaml"
OVERLAYS = INSTALL / "overlays"

NEWEST = "1.37"  # of Kubernetes
TOOLS = REPOSITORY / ".venv" / "bin"  # install/setup.sh puts helm and kubectl there


class ToolError(Exception):
    """helm or kubectl has refused; the message is theirs."""


def _run(tool: str, *arguments: str | Path, stdin: str = "") -> str:
    done = subprocess.run(
        [TOOLS / tool, *arguments], input=stdin, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ToolError(done.stderr)
    return done.stdout


def helm(*arguments: str | Path) -> str:
    """What helm prints; raises ToolError."""
    return _run("helm", *arguments)


def templated(
    values: Json | None = None,
    kubernetes: str = NEWEST,
    namespace: str = "kube-system",
    only: str = "",
) -> str:
    """What `helm template` makes of the chart, or of one template; raises ToolError."""
    options = ("--namespace", namespace, "--kube-version", f"{kubernetes}.0")
    shown = [f"--show-only=templates/{only}.yaml"] if only else []
    values_json = [f"--set-json={key}={json.dumps(value)}" for key, value in (values or {}).items()]
    return helm("template", "tcpip-bypass", CHART, *options, *shown, *values_json)


def kustomized(folder: Path) -> list[Json]:
    """What `kubectl kustomize` makes of an overlay."""
    return parsed(_run("kubectl", "kustomize", folder))


def patched(document: Json, patch: Json) -> Json:
    """The object after `kubectl patch`, a strategic merge as the API server does it."""
    text = json.dumps(patch)
    options = ("--local", "-f", "-", "--type", "strategic", "--patch", text, "-o", "json")
    result: Json = json.loads(_run("kubectl", "patch", *options, stdin=json.dumps(document)))
    return result


def parsed(text: str) -> list[Json]:
    """Every object in a text of YAML."""
    return [document for document in yaml.safe_load_all(text) if document]


def documents(path: Path) -> list[Json]:
    """Every object in a file of YAML."""
    return parsed(path.read_text())


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
