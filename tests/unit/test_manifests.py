# SPDX-License-Identifier: Apache-2.0
"""The manifests: what Kubernetes and kustomize would say of them, and what they promise."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import kubernetes_validate
import pytest
import tomllib
import yaml
from packaging.requirements import Requirement

from install.program import VERSION, cli
from install.program.agent.agent import LOAD_S
from install.program.agent.command import CRI_SOCKETS
from install.program.agent.http import START_PATIENCE_S
from install.program.agent.kubernetes import DaemonSet
from tests import manifests
from tests.bed.bed import REPOSITORY

# The oldest and the newest Kubernetes; the field appArmorProfile came with 1.30.
SUPPORTED = ("1.30", manifests.NEWEST)
OLD = ("1.25", "1.29")
OLD_OVERLAY = "kubernetes-1.29"

VARIANTS = sorted(path.name for path in manifests.OVERLAYS.iterdir())
BASE = manifests.documents(manifests.DAEMONSET)


def validate(objects: list[manifests.Json], versions: tuple[str, ...]) -> None:
    for version in versions:
        for each in objects:
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_overlay_is_valid_for_kubernetes(name: str) -> None:
    objects = manifests.kustomized(manifests.OVERLAYS / name)
    validate(objects, OLD if name == OLD_OVERLAY else SUPPORTED)


def test_the_schema_would_notice() -> None:
    sound = manifests.daemonset(BASE)
    broken = {**sound, "spec": {**sound["spec"], "updateStrategi": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate([broken], SUPPORTED)
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(BASE, OLD)  # an unknown field there: what the overlay for them is about


def test_the_one_file_is_a_file_and_the_base() -> None:
    assert not manifests.DAEMONSET.is_symlink()  # a raw URL would serve the link's target's name
    assert by_name(manifests.kustomized(manifests.OVERLAYS / "base")) == by_name(BASE)


def by_name(objects: list[manifests.Json]) -> dict[tuple[str, str], manifests.Json]:
    return {(each["kind"], each["metadata"]["name"]): each for each in objects}


def test_the_patch_that_uninstalls_fits_every_overlay() -> None:
    (patch,) = manifests.documents(manifests.UNINSTALL)
    for name in VARIANTS:
        before = manifests.kustomized(manifests.OVERLAYS / name)
        after = manifests.patched(manifests.daemonset(before), patch)
        validate([after], OLD if name == OLD_OVERLAY else SUPPORTED)
        container = manifests.agent([after])
        assert container["readinessProbe"].keys() & {"exec", "httpGet"} == {"exec"}
        for kept in ("image", "volumeMounts", "securityContext"):
            assert container[kept] == manifests.agent(before)[kept]


@pytest.mark.parametrize("name", VARIANTS)
def test_overlays_change_only_places(name: str) -> None:
    """What the pod may do and where it finds things is the same on every distribution."""
    objects = manifests.kustomized(manifests.OVERLAYS / name)
    base, container = manifests.agent(BASE), dict(manifests.agent(objects))
    assert container["volumeMounts"] == base["volumeMounts"]
    assert container["args"] == base["args"]
    assert manifests.capabilities(objects) == manifests.capabilities(BASE)
    assert {each["name"] for each in manifests.pod_spec(objects)["volumes"]} == {
        each["name"] for each in base["volumeMounts"]
    }


def test_least_privilege() -> None:
    context = manifests.agent(BASE)["securityContext"]
    assert not context["privileged"]
    assert context["readOnlyRootFilesystem"]
    spec = manifests.pod_spec(BASE)
    assert "hostIPC" not in spec
    assert spec["hostPID"]  # passes visit processes by their IDs on the node
    (role,) = [each for each in BASE if each["kind"] == "Role"]
    (rule,) = role["rules"]
    assert rule["verbs"] == ["get"]
    assert rule["resourceNames"] == [manifests.daemonset(BASE)["metadata"]["name"]]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_account_that_asks_outlives_the_daemonset(name: str) -> None:
    """Not where an SCC is bound to it; both bindings name the account that the pods have."""
    objects = manifests.kustomized(manifests.OVERLAYS / name)
    spec = manifests.pod_spec(objects)
    ours = [each["metadata"]["name"] for each in objects if each["kind"] == "ServiceAccount"]
    assert ours == (["tcpip-bypass-node"] if name == "openshift" else [])
    assert [spec["serviceAccountName"]] == (ours or ["default"])
    assert spec["automountServiceAccountToken"]  # whatever the default account says
    bindings = [each for each in objects if each["kind"] == "RoleBinding"]
    assert len(bindings) == 1 + len(ours)
    for binding in bindings:
        (subject,) = binding["subjects"]
        assert subject["name"] == spec["serviceAccountName"]


def test_mounts_do_not_live_on_in_the_pod() -> None:
    """A folder below which the node mounts and unmounts comes with propagation."""
    mounts = {each["name"]: each for each in manifests.agent(BASE)["volumeMounts"]}
    for name in ("bpffs", "cgroup", "netns", "containerd", "crio"):
        assert mounts[name]["mountPropagation"] == "HostToContainer"
    assert mounts["proc"]["readOnly"]


def test_no_runtimes_socket_is_needed_for_the_pod_to_start() -> None:
    """Of containerd and CRI-O a node has one; kubelet waits for ever for a Directory."""
    volumes = {each["name"]: each for each in manifests.pod_spec(BASE)["volumes"]}
    mounts = {each["name"]: each["mountPath"] for each in manifests.agent(BASE)["volumeMounts"]}
    for name in ("containerd", "crio"):
        assert volumes[name]["hostPath"]["type"] == "DirectoryOrCreate"
        assert any(socket.parent == Path(mounts[name]) for socket in CRI_SOCKETS)
    assert volumes["switch"]["configMap"]["optional"]


def test_selector_and_nodes() -> None:
    selector = manifests.daemonset(BASE)["spec"]["selector"]["matchLabels"]
    assert selector == {"app.kubernetes.io/name": "tcpip-bypass"}  # it may never change
    assert manifests.pod_spec(BASE)["nodeSelector"] == {
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
    }


def test_a_start_is_waited_for_and_not_asked_after() -> None:
    """Every probe that is answered "not yet" is a Warning event."""
    probe = manifests.agent(BASE)["startupProbe"]
    assert probe["httpGet"]["path"] == "/startupz"
    assert probe["timeoutSeconds"] > START_PATIENCE_S
    assert probe["timeoutSeconds"] * probe["failureThreshold"] > LOAD_S


def test_the_arguments_are_the_programs_own() -> None:
    container, meta = manifests.agent(BASE), manifests.daemonset(BASE)["metadata"]
    arguments = cli.build_parser().parse_args(manifests.arguments(BASE))
    assert arguments.command == "agent"
    mounts = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    assert arguments.switch_dir == Path(mounts["switch"])
    assert DaemonSet.parse(arguments.daemonset) == DaemonSet(meta["namespace"], meta["name"])
    (port,) = container["ports"]
    assert arguments.listen.endswith(f":{port['containerPort']}")
    annotations = manifests.daemonset(BASE)["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])


def test_the_uninstalling_command_is_the_programs_own() -> None:
    (patch,) = manifests.documents(manifests.UNINSTALL)
    (script,) = manifests.agent([patch])["args"]
    (command,) = re.findall(r"^tcpip-bypass-node (.+)$", script, re.MULTILINE)
    assert cli.build_parser().parse_args(command.split()).command == "uninstall"


def probes(objects: list[manifests.Json]) -> Iterator[manifests.Json]:
    for container in manifests.pod_spec(objects)["containers"]:
        yield from (probe for key, probe in container.items() if key.endswith("Probe") and probe)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_probe_takes_the_nodes_process_1_for_the_pods(name: str) -> None:
    """With hostPID /proc/1 is the node's init, whatever runs in the pod."""
    (patch,) = manifests.documents(manifests.UNINSTALL)
    objects = manifests.kustomized(manifests.OVERLAYS / name)
    uninstalling = [manifests.patched(manifests.daemonset(objects), patch)]
    for each in (objects, uninstalling):
        assert manifests.pod_spec(each)["hostPID"]
        found = list(probes(each))
        assert found
        assert "/proc" not in json.dumps(found)


@pytest.mark.parametrize("status", [0, 1])
def test_a_pod_that_uninstalls_is_ready_once_its_node_is_clean(tmp_path: Path, status: int) -> None:
    (patch,) = manifests.documents(manifests.UNINSTALL)
    container = manifests.agent([patch])

    def here(words: list[str]) -> list[str]:
        return [each.replace("/dev/shm", str(tmp_path)) for each in words]

    probe = here(container["readinessProbe"]["exec"]["command"])
    assert any(str(tmp_path) in each for each in probe)
    meanwhile = f"{shlex.join(probe)} && touch {tmp_path}/too-early\nexit {status}"
    for name, script in (("tcpip-bypass-node", meanwhile), ("sleep", "touch at-rest")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def is_ready() -> bool:
        return subprocess.run(probe, check=False).returncode == 0

    assert not is_ready()
    for _ in range(2):  # a container that is started again has what the first one left
        done = subprocess.run(
            here([*container["command"], *container["args"]]),
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == status  # sleep's, or the uninstall's
        assert is_ready() == (tmp_path / "at-rest").exists() == (status == 0)
        assert not (tmp_path / "too-early").exists()


def test_there_is_one_version() -> None:
    """pyproject.toml has it; the image's name, wherever it stands, and the change log follow."""
    places = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    places += [path for path in (REPOSITORY / "install").rglob("*") if path.is_file()]
    tags = {
        path: set(re.findall(rb"tcpip-bypass:(\d[\w.-]*)", path.read_bytes())) for path in places
    }
    tagged = {path: found for path, found in tags.items() if found}
    assert REPOSITORY / "install/overlays/base/daemonset.yaml" in tagged
    assert {path: found for path, found in tagged.items() if found != {VERSION.encode()}} == {}
    chart = yaml.safe_load((REPOSITORY / "install/chart/Chart.yaml").read_text())
    assert {chart["version"], chart["appVersion"]} == {VERSION}
    newest = re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest
    assert newest.group(1) == VERSION


def third_party_imports() -> set[str]:
    """The distributions that the node program and its libraries of ours import."""
    found = set()
    for folder in ("bpf", "cni_plugin", "install"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for each in ast.walk(ast.parse(path.read_text())):
                if isinstance(each, ast.Import):
                    found |= {alias.name.partition(".")[0] for alias in each.names}
                elif isinstance(each, ast.ImportFrom) and each.module and not each.level:
                    found.add(each.module.partition(".")[0])
    distributions = metadata.packages_distributions()
    ours = {"bpf", "cni_plugin", "install", "tests"}
    outside = {name for name in found if name not in sys.stdlib_module_names} - ours
    return {canonical(each) for name in outside for each in distributions.get(name, [name])}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_image_has_the_libraries_that_are_imported() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {canonical(each) for each in project["dependencies"]}
    assert third_party_imports() - {"bcc"} == declared  # bcc is Debian's


def test_every_library_in_the_image_is_pinned() -> None:
    """Also those that the declared ones bring: their versions are this venv's."""
    text = Path(REPOSITORY / "requirements.txt").read_text()
    pinned = {canonical(name) for name in re.findall(r"^([\w.-]+)==", text, re.MULTILINE)}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    waiting, needed = list(project["dependencies"]), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonical(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and name not in needed:
            needed.add(name)
            waiting += metadata.requires(name) or ()
    assert needed - pinned == set()


def test_the_estimating_job() -> None:
    (job,) = manifests.documents(manifests.ESTIMATE)
    validate([job], SUPPORTED)
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    arguments = cli.build_parser().parse_args(container["args"])
    assert arguments.command == "estimate"
    assert container["image"] == manifests.agent(BASE)["image"]
    # It looks only: nothing of the node can be written, and there is no bpffs to pin anything.
    assert all(each["readOnly"] for each in container["volumeMounts"])
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {each["name"] for each in spec["volumes"]} == {"netns", "cri", "proc"}
    assert all(each["hostPath"]["type"] == "Directory" for each in spec["volumes"])
    assert not spec["automountServiceAccountToken"]
