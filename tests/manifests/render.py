# SPDX-License-Identifier: Apache-2.0
"""What is rendered from the chart: the plain manifests, and overlays as patches on top of them.

An overlay holds what differs, and nothing else: a strategic merge patch, found by comparing what
the chart makes for a platform with what it makes by default.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests import manifests
from tests.bed.bed import REPOSITORY
from tests.manifests import CHART, DAEMONSET, ESTIMATE, MONITORING, OVERLAYS, Json

PLATFORMS = CHART / "files" / "platforms.yaml"
RULES = CHART / "files" / "rules.yaml"
DASHBOARD = CHART / "files" / "dashboard.json"
OPERATING = REPOSITORY / "docs" / "operating.md"
DEFAULT = "kubeadm"
BASE = OVERLAYS / "base"
GENERATED = "# Rendered from install/chart by `make manifests`; change it there.\n"

# patchMergeKey in the Kubernetes API's types; a list that is not here is replaced as a whole.
_MERGE_KEYS = {"containers": "name", "volumes": "name"}
_HEAD = """\
# tcpip-bypass on every node: kubectl apply -f install/daemonset.yaml
# Other kinds of clusters: kubectl apply -k install/overlays/NAME. docs/deploy.md has the rest.
"""
_MONITORING_HEAD = """\
# For the Prometheus operator and Grafana's sidecar: kubectl apply -f install/monitoring.yaml, with
# the labels that yours select. docs/operating.md has the alerts.
"""
_ESTIMATE_HEAD = """\
# What would tcpip-bypass bring on these nodes? Looks at the pods' connections for a minute, prints
# the answer into its log, and ends. Loads nothing, attaches nothing, writes nothing.
#     kubectl label node NAME... tcpip-bypass/estimate=true
#     kubectl apply -f install/estimate.yaml       # completions and parallelism: how many nodes
#     kubectl -n kube-system logs -l app.kubernetes.io/name=tcpip-bypass-estimate --prefix --tail=-1
#     kubectl delete -f install/estimate.yaml
# On k3s, CRI-O (criSocket=/run/crio/crio.sock) and others, in place of the second line:
#     helm template install/chart -n kube-system --set platform=k3s,estimate.nodes=3 \\
#         -s templates/estimate.yaml | kubectl apply -f -
"""
_BEGIN, _END = "<!-- alerts: rendered by make manifests -->", "<!-- end of alerts -->"
_KIND = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}


@dataclass(frozen=True)
class Overlay:
    """A kind of cluster, or a way to start, for which the chart makes something else."""

    about: str
    values: Json
    kubernetes: str = manifests.NEWEST

    def objects(self) -> list[Json]:
        """What helm makes for it."""
        values = {**self.values, "managedBy": "kubectl"}
        return manifests.parsed(manifests.templated(values, self.kubernetes))


def platforms() -> dict[str, Json]:
    """What the chart knows, by name."""
    found: dict[str, Json] = yaml.safe_load(PLATFORMS.read_text())
    return found


def overlays() -> dict[str, Overlay]:
    """By the name of their folder."""
    found = {
        name: Overlay(platform["about"], {"platform": name})
        for name, platform in platforms().items()
        if name != DEFAULT
    }
    found["kubernetes-1.29"] = Overlay(
        "Kubernetes before 1.30 knows AppArmor by an annotation, and refuses the field.", {}, "1.29"
    )
    found["one-node"] = Overlay(
        "To start with: only nodes that have the label.\n"
        "    kubectl label node NAME tcpip-bypass/try=true",
        {"nodeSelector": {"tcpip-bypass/try": "true"}},
    )
    return found


def files() -> dict[Path, str]:
    """Every rendered file, and its text."""
    plain = {"managedBy": "kubectl"}
    manifest = _HEAD + GENERATED + _without_sources(manifests.templated(plain))
    base = manifests.parsed(manifest)
    found = {
        DAEMONSET: manifest,
        BASE / "daemonset.yaml": manifest,
        BASE / "kustomization.yaml": GENERATED
        + "# The manifest itself is here because a base may not be above its overlays.\n"
        + _dump({**_KIND, "resources": ["daemonset.yaml"]}),
    }
    for name, overlay in overlays().items():
        found |= _overlay(OVERLAYS / name, overlay, base)
    on = {"monitoring": {"podMonitor": True, "prometheusRule": True, "dashboard": True}}
    monitoring = manifests.templated({**plain, **on}, only="monitoring")
    found[MONITORING] = _MONITORING_HEAD + GENERATED + _without_sources(monitoring)
    estimate = manifests.templated({**plain, "estimate": {"nodes": 3}}, only="estimate")
    found[ESTIMATE] = _ESTIMATE_HEAD + GENERATED + _without_sources(estimate)
    found[OPERATING] = with_alerts(OPERATING.read_text())
    return found


def rules() -> list[Json]:
    """Prometheus' alerting rules."""
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[Json] = group["rules"]
    return found


def with_alerts(text: str) -> str:
    """The page, with its table of alerts as the rules are now."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    rows = ["| alert | expression | for | means, and what to do |", "| --- | --- | --- | --- |"]
    for rule in rules():
        told = {key: _without_labels(text) for key, text in rule["annotations"].items()}
        name, severity = rule["alert"], rule["labels"]["severity"]
        expression = rule["expr"].replace("|", "\\|")
        rows.append(
            f'| <a id="{name.lower()}"></a>`{name}`, {severity} | `{expression}` | '
            f"{rule.get('for', '')} | {told['summary']} {told['description']} |"
        )
    return before + _BEGIN + "\n" + "\n".join(rows) + "\n" + _END + after


def _without_labels(text: str) -> str:
    """What a template of Prometheus' says without an alert at hand."""
    text = text.replace("{{ $labels.instance }}", "a node").replace("{{ $value }} pods", "Pods")
    text = text.replace("{{ $labels.state }}", "lost or failed")
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", r"(label `\1`)", text)


def _without_sources(text: str) -> str:
    text = re.sub(r"^# Source: .*\n", "", text.removeprefix("---\n"), flags=re.MULTILINE)
    return text.rstrip("\n") + "\n"


def _overlay(folder: Path, overlay: Overlay, base: list[Json]) -> dict[Path, str]:
    objects, patches, found = {_key(each): each for each in overlay.objects()}, [], {}
    for before in base:
        after = objects.pop(_key(before))
        if change := difference(before, after):
            head = {key: before[key] for key in ("apiVersion", "kind")}
            named = {"metadata": {k: before["metadata"][k] for k in ("name", "namespace")}}
            patches.append({"patch": _dump({**head, **named, **change})})
    about = "".join(f"# {line}\n" for line in overlay.about.strip().splitlines())
    kustomization: Json = {**_KIND, "resources": ["../base"]}
    if objects:
        kustomization["resources"].append("more.yaml")
        found[folder / "more.yaml"] = GENERATED + "---\n".join(map(_dump, objects.values()))
    if patches:
        kustomization["patches"] = patches
    return {folder / "kustomization.yaml": about + GENERATED + _dump(kustomization), **found}


def _key(document: Json) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def difference(before: Json, after: Json) -> Json:
    """The strategic merge patch that makes `after` of `before`."""
    change: Json = dict.fromkeys(before.keys() - after.keys())
    for key, value in after.items():
        old = before.get(key)
        if old == value:
            continue
        if isinstance(old, dict) and isinstance(value, dict):
            change[key] = difference(old, value)
        elif key in _MERGE_KEYS and old is not None:
            change[key] = _difference_of_lists(old, value, _MERGE_KEYS[key])
        else:
            change[key] = value
    return change


def _difference_of_lists(before: list[Json], after: list[Json], key: str) -> list[Json]:
    """Of lists with the same items, by that key."""
    return [
        {key: new[key], **difference(old, new)}
        for old, new in zip(before, after, strict=True)
        if old != new
    ]


class _Dumper(yaml.SafeDumper):
    """Lists indented, and texts of several lines as they are."""

    def increase_indent(self, flow: bool = False, *_: Any, **__: Any) -> Any:
        return super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _dump(document: Json) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=100)
