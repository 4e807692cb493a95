# SPDX-License-Identifier: Apache-2.0
"""What each command imports: a module more is time that every pod's start waits for."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from cni_plugin import names
from tests.unit.cases import ROOT

RUN = """
import sys
sys.path[:0] = sys.argv[1:]
from cni_plugin.main import main
main()
sys.stderr.write("\\n" + " ".join(sys.modules))
"""
SIDECAR = {names.SIDECAR_STATUS: "{}"}


def imported(command: str, conf: dict[str, Any]) -> set[str]:
    """The modules of one call, run without site so that all of them are the plugin's."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, ROOT, sysconfig.get_path("purelib")],
        env={
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": "c",
            "CNI_NETNS": "/no/such",
            "CNI_IFNAME": "eth0",
        },
        input=json.dumps(conf, separators=(",", ":")),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.splitlines()[-1].split())


@pytest.fixture
def conf(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "state").mkdir()
    return {
        "cniVersion": "1.1.0",
        "name": "pods",
        "type": names.PLUGIN,
        "bpffs": str(tmp_path / "bpffs"),
        "stateDir": str(tmp_path / "state"),
        "runtimeConfig": {names.POD_ANNOTATIONS: {}},
        "prevResult": {"ips": [{"address": "10.22.0.7/16"}]},
    }


def test_version_imports_hardly_any_module() -> None:
    found = imported("VERSION", {"cniVersion": "1.0.0"})
    assert {name for name in found if name.startswith("cni_plugin")} == {
        "cni_plugin",
        "cni_plugin.main",
        "cni_plugin.names",
        "cni_plugin.version",
    }
    assert found.isdisjoint({"json", "re", "typing", "ctypes", "pathlib"})


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_a_pod_that_is_not_ours_needs_no_kernel_and_no_schema(
    conf: dict[str, Any], command: str
) -> None:
    found = imported(command, conf)
    assert found.isdisjoint({"ctypes", "jsonschema", "pyroute2", "dataclasses"})


def test_a_configuration_is_validated_once(conf: dict[str, Any]) -> None:
    conf["runtimeConfig"] = {names.POD_ANNOTATIONS: SIDECAR}
    assert "jsonschema" in imported("ADD", conf)
    # What belongs to the call is no part of what was validated.
    conf["prevResult"] = {"ips": [{"address": "10.22.0.8/16"}]}
    conf["runtimeConfig"] = {names.POD_ANNOTATIONS: {**SIDECAR, "app": "cart"}}
    conf["args"] = {"cni": {}}
    assert "jsonschema" not in imported("ADD", conf)
    conf["excludePorts"] = [80]
    assert "jsonschema" in imported("ADD", conf)


def test_a_wrong_entry_in_the_cache_is_no_proof(conf: dict[str, Any]) -> None:
    """Only the very same words count, not a file of the right name."""
    conf["runtimeConfig"] = {names.POD_ANNOTATIONS: SIDECAR}
    imported("ADD", conf)
    (known,) = Path(conf["stateDir"], names.VALIDATED).iterdir()
    known.write_text(known.read_text().replace("1.1.0", "1.0.0"))
    assert "jsonschema" in imported("ADD", conf)


def test_only_check_talks_netlink(conf: dict[str, Any]) -> None:
    for command in ("ADD", "DEL"):
        conf["runtimeConfig"] = {names.POD_ANNOTATIONS: SIDECAR}
        assert "pyroute2" not in imported(command, conf)
