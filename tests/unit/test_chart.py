# SPDX-License-Identifier: Apache-2.0
"""The chart: as real helm sees it, equal to everything that is rendered from it, and strict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cni_plugin import names, schema
from install.program import VERSION, installer, switch
from install.program.cli import build_parser
from tests import manifests
from tests.manifests import CHART, render
from tests.unit.cases import ROOT

OVERLAYS = render.overlays()
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
KUBERNETES = ("1.30", manifests.NEWEST)


def by_name(objects: list[manifests.Json]) -> dict[tuple[str, str], manifests.Json]:
    """Objects by kind and name; kustomize puts the volumes that a patch names first."""
    for each in objects:
        if each["kind"] == "DaemonSet":
            each["spec"]["template"]["spec"]["volumes"].sort(key=lambda volume: volume["name"])
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def chart(**values: Any) -> list[manifests.Json]:
    return manifests.parsed(manifests.templated(values))


def test_lint() -> None:
    assert "0 chart(s) failed" in manifests.helm("lint", "--strict", CHART)


def test_what_is_rendered_is_up_to_date() -> None:
    """`make manifests` would change nothing."""
    files = render.files()
    assert {path for path in manifests.OVERLAYS.rglob("*") if path.is_file()} <= files.keys()
    for path, text in files.items():
        assert path.read_text() == text, f"{path}: run make manifests"


@pytest.mark.parametrize("name", sorted(OVERLAYS))
def test_an_overlay_is_what_the_chart_makes(name: str) -> None:
    kustomized = manifests.kustomized(manifests.OVERLAYS / name)
    assert by_name(kustomized) == by_name(OVERLAYS[name].objects())


@pytest.mark.parametrize("platform", sorted(render.platforms()))
@pytest.mark.parametrize("kubernetes", KUBERNETES)
def test_every_platform_is_valid_for_kubernetes(platform: str, kubernetes: str) -> None:
    values = {"platform": platform}
    for namespace in ("kube-system", "bypass"):
        for each in manifests.parsed(manifests.templated(values, kubernetes, namespace)):
            kubernetes_validate.validate(each, kubernetes, strict=True)
            assert each["metadata"]["namespace"] == namespace


@pytest.mark.parametrize("platform", sorted(render.platforms()))
@pytest.mark.parametrize("kubernetes", ["1.25", *KUBERNETES])
def test_the_estimating_job_of_every_platform(platform: str, kubernetes: str) -> None:
    """With the runtime's folder as the DaemonSet has it, where the program is told to look."""
    values = {"platform": platform, "estimate": {"nodes": 2}}
    objects = manifests.parsed(manifests.templated(values, kubernetes, only="estimate"))
    for each in objects:
        kubernetes_validate.validate(each, kubernetes, strict=True)
    *before, job = objects
    spec = job["spec"]["template"]["spec"]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (2, 2)
    assert [each["kind"] for each in before] == (
        ["ServiceAccount", "RoleBinding"] if "serviceAccountName" in spec else []
    )
    installed = manifests.pod_spec(chart(platform=platform))
    (container,) = spec["containers"]
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "cri"]
    (path,) = [each["hostPath"]["path"] for each in spec["volumes"] if each["name"] == "cri"]
    (socket,) = [each for each in container["args"] if each.startswith("--cri-socket=")]
    assert socket.startswith(f"--cri-socket={mount['mountPath']}/")
    runtime = "crio" if platform == "openshift" else "containerd"
    folders = {each["name"]: each.get("hostPath", {}).get("path") for each in installed["volumes"]}
    assert path == folders[runtime]
    assert container["imagePullPolicy"] == installed["containers"][0]["imagePullPolicy"]


def test_the_estimating_job_on_a_node_with_crio_and_with_a_configuration() -> None:
    (job,) = manifests.parsed(
        manifests.templated(
            {
                "estimate": {"nodes": 1, "seconds": 5},
                "criSocket": "/run/crio/crio.sock",
                "conf": {"scope": "all"},
                "imagePullSecrets": ["registry"],
            },
            only="estimate",
        )
    )
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    arguments = build_parser().parse_args(container["args"])
    assert (arguments.command, arguments.seconds) == ("estimate", 5)
    assert arguments.cri_socket == "/run/crio/crio.sock"
    assert json.loads(arguments.conf_json) == {"scope": "all"}
    (path,) = [each["hostPath"]["path"] for each in spec["volumes"] if each["name"] == "cri"]
    assert path == "/run/crio"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]


@pytest.mark.parametrize("platform", sorted(render.platforms()))
def test_every_object_has_the_labels_that_kubernetes_recommends(platform: str) -> None:
    parts = {"podMonitor": True, "prometheusRule": True, "dashboard": True}
    objects = chart(platform=platform, monitoring=parts, estimate={"nodes": 1})
    assert {"DaemonSet", "Job", "PodMonitor"} <= {each["kind"] for each in objects}
    templates = [each["spec"]["template"] for each in objects if "template" in each.get("spec", {})]
    assert len(templates) == 2
    for each in (*objects, *templates):
        labels = each["metadata"]["labels"]
        prefix = "app.kubernetes.io/"
        found = {key.removeprefix(prefix): labels[key] for key in labels if prefix in key}
        is_estimate = found["component"] == "estimate"
        assert found == {
            "name": "tcpip-bypass-estimate" if is_estimate else "tcpip-bypass",
            "instance": "tcpip-bypass",
            "version": VERSION,
            "component": "estimate" if is_estimate else "node",
            "part-of": "tcpip-bypass",
            "managed-by": "Helm",
        }
        assert is_estimate == ("estimate" in each["metadata"].get("name", found["name"]))


def test_an_installation_estimates_only_when_asked() -> None:
    assert "Job" not in {each["kind"] for each in chart()}
    (job,) = [each for each in chart(estimate={"nodes": 1}) if each["kind"] == "Job"]
    selector = manifests.daemonset(chart())["spec"]["selector"]["matchLabels"]
    assert not selector.items() <= job["spec"]["template"]["metadata"]["labels"].items()


def test_platforms_are_istio_cnis_and_more() -> None:
    """What the schema lets pass, the table knows; each with the same keys as the values."""
    assert set(SCHEMA["properties"]["platform"]["enum"]) == render.platforms().keys()
    for platform in render.platforms().values():
        places = {"cniConfDir", "cniBinDir", "containerdDir", "crioDir"}
        assert places <= platform.keys()
        others = {"criSocket", "about", "imagePullPolicy", "notNodes", "scc"}
        assert platform.keys() <= places | others
        assert {*places, "criSocket"} <= VALUES.keys()


def test_configuration_and_switch_are_the_plugins_own() -> None:
    plugin = json.loads(schema.schema_path().read_text())
    ours = SCHEMA["properties"]
    assert SCHEMA["definitions"]["namespaces"] == plugin["definitions"]["namespaces"]
    for key, value in ours["conf"]["properties"].items():
        assert value == plugin["properties"][key]
    documented = ("scope", "mode", "fionread", "includeNamespaces", "excludeNamespaces")
    others = ("excludePorts", "proxyUID", "proxyUIDs")
    assert ours["conf"]["properties"].keys() == {*documented, *others}
    assert ours["switch"]["properties"].keys() == switch.Switch().as_json().keys()


def test_every_value_is_in_the_schema() -> None:
    def check(values: manifests.Json, rules: manifests.Json) -> None:
        assert not rules["additionalProperties"]
        assert values.keys() <= rules["properties"].keys()
        for key, value in values.items():
            if "properties" in rules["properties"][key] and isinstance(value, dict):
                check(value, rules["properties"][key])

    check(VALUES, SCHEMA)
    assert SCHEMA["properties"].keys() - VALUES.keys() == {"global"}  # helm's own


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("platform", "aks", "/platform"),
        ("platfrom", "gke", "platfrom"),
        ("port", "15099", "/port"),
        ("conf", {"scope": "everything"}, "/conf/scope"),
        ("conf", {"exculdePorts": [22]}, "exculdePorts"),
        ("conf", {"excludePorts": [0]}, "/conf/excludePorts/0"),
        ("conf", {"stateDir": "/tmp"}, "stateDir"),
        ("switch", {"paused": "yes"}, "/switch/paused"),
        ("switch", {"scope": "all"}, "scope"),
        ("image", {"digest": "latest"}, "/image/digest"),
        ("cniBinDir", "opt/cni/bin", "/cniBinDir"),
        ("nodeSelector", {"a": True}, "/nodeSelector/a"),
        ("monitoring", {"podmonitor": True}, "podmonitor"),
        ("estimate", {"nodes": "all"}, "/estimate/nodes"),
    ],
)
def test_a_wrong_value_is_refused_by_name(key: str, value: Any, named: str) -> None:
    with pytest.raises(manifests.ToolError, match=named):
        chart(**{key: value})


def test_values_arrive_where_they_belong() -> None:
    conf = {"scope": "annotated", "includeNamespaces": ["shop"], "excludePorts": [22, "80-90"]}
    objects = chart(
        conf=conf,
        platform="gke",
        cniBinDir="/elsewhere/bin",
        port=9000,
        arch="",
        image={"repository": "registry/bypass", "digest": f"sha256:{64 * 'a'}"},
        nodeSelector={"tcpip-bypass/try": "true"},
        switch={"paused": True, "excludeNamespaces": ["a", "b"], "excludePorts": [22, "80-90"]},
        criSocket="/run/crio/crio.sock",
        perPodMetrics=True,
        imagePullSecrets=["registry"],
    )
    arguments = build_parser().parse_args(manifests.arguments(objects))
    assert json.loads(arguments.conf_json) == conf
    assert arguments.listen == ":9000"
    assert arguments.cri_socket == "/run/crio/crio.sock"
    assert arguments.per_pod_metrics
    spec = manifests.pod_spec(objects)
    assert spec["nodeSelector"] == {"kubernetes.io/os": "linux", "tcpip-bypass/try": "true"}
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    volumes = {each["name"]: each.get("hostPath", {}).get("path") for each in spec["volumes"]}
    assert volumes["cni-bin"] == "/elsewhere/bin"
    assert manifests.agent(objects)["image"] == f"registry/bypass@sha256:{64 * 'a'}"
    data = by_name(objects)["ConfigMap", "tcpip-bypass-switch"]["data"]
    assert switch.parse(data) == switch.Switch(True, None, ("a", "b"), ("22", "80-90"))


@pytest.mark.parametrize("values", [{}, {"conf": {}}, {"conf": None}])
def test_keys_taken_out_of_the_configuration_leave_our_entry(values: manifests.Json) -> None:
    """Without the option the agent would keep what the entry has."""
    arguments = build_parser().parse_args(manifests.arguments(chart(**values)))
    assert arguments.conf_json == "{}"
    entry = installer.entry(
        Path(names.BPFFS), Path(names.STATE_DIR), installer.parse_options(arguments.conf_json)
    )
    assert "scope" not in entry.over({"type": names.PLUGIN, "scope": "annotated"})


def test_applying_again_leaves_the_switch_alone() -> None:
    assert "data" not in by_name(chart())["ConfigMap", "tcpip-bypass-switch"]


def test_the_notes_end_in_the_check() -> None:
    notes = manifests.helm("install", "x", CHART, "--dry-run=client", "--namespace", "bypass")
    assert notes.rstrip().endswith(
        "kubectl -n bypass exec ds/tcpip-bypass-node -- tcpip-bypass-node check"
    )


def test_versions_are_one() -> None:
    meta = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{meta["version"]}"\n' in project
    assert meta["appVersion"] == meta["version"]
    label = f'org.opencontainers.image.version="{meta["version"]}"'
    assert label in (ROOT / "install" / "Dockerfile").read_text()
