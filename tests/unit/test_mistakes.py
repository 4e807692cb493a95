# SPDX-License-Identifier: Apache-2.0
"""Our own mistakes, and damage to our program: pods start and end, and no traceback is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cni_plugin import names
from cni_plugin.state import State
from tests.unit.cases import ROOT

RESULT = {"cniVersion": "1.1.0", "ips": [{"address": "10.22.0.7/16"}]}
COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS")
# What the commands import, and what a frozen program may have lost.
MODULES = (
    *("_ctypes", "fcntl", "ipaddress", "select", "zlib", "jsonschema", "pyroute2"),
    *("cni_plugin.add", "cni_plugin.attachment", "cni_plugin.policy", "cni_plugin.schema"),
    *("cni_plugin.delete", "cni_plugin.status", "cni_plugin.state", "cni_plugin.cgroup"),
)
WITHOUT = """
import sys
for name in sys.argv.pop().split():
    sys.modules[name] = None
from cni_plugin.main import main
sys.exit(main())
"""
MISTAKEN = """
import sys
from cni_plugin import main

def mistake(request):
    try:
        raise KeyError("first")
    except KeyError as error:
        import traceback
        raise RuntimeError(traceback.format_exc()) from error

main._dispatch = mistake
sys.exit(main.main())
"""


def call(
    command: str, folder: Path, code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """The plugin for a pod of the mesh."""
    conf = {
        **{"cniVersion": "1.1.0", "name": "pods", "type": names.PLUGIN},
        **{"bpffs": str(folder), "stateDir": str(folder), names.VALID_ATTACHMENTS: []},
        "runtimeConfig": {names.POD_ANNOTATIONS: {names.SIDECAR_STATUS: "{}"}},
        "prevResult": RESULT,
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={
            **{"CNI_COMMAND": command, "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0"},
            **{"CNI_NETNS": "/no/such", "CNI_PATH": "/no/such"},
        },
        cwd=ROOT,
        input=json.dumps(conf),
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr, done
    return done


def check_passed_through(command: str, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done
    assert (json.loads(done.stdout) if done.stdout else None) == (
        RESULT if command == "ADD" else None
    )


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_lost(module: str, tmp_path: Path) -> None:
    for command in ("ADD", "DEL", "STATUS"):
        check_passed_through(command, call(command, tmp_path, WITHOUT, module))


@pytest.mark.parametrize("module", ["json", "typing", "cni_plugin.protocol"])
def test_not_even_the_call_can_be_read(module: str, tmp_path: Path) -> None:
    for command in COMMANDS:
        done = call(command, tmp_path, WITHOUT, module)
        if command in ("DEL", "STATUS"):  # as start.c does without the plugin
            check_passed_through(command, done)
            assert "warning: internal error: " in done.stderr
        else:
            assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 999)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_of_ours(command: str, tmp_path: Path) -> None:
    done = call(command, tmp_path, MISTAKEN)
    if command in ("ADD", "DEL", "STATUS"):
        check_passed_through(command, done)
        assert "warning: internal error: RuntimeError" in done.stderr
        return
    answer: Any = json.loads(done.stdout)
    assert (done.returncode, answer["code"]) == (1, 999)
    assert answer["msg"] == "internal error: RuntimeError"


def test_what_is_recorded_cannot_be_read(tmp_path: Path) -> None:
    """An error for those who asked what is there; nothing that keeps a pod from ending."""
    folder = tmp_path / names.ATTACHMENTS
    folder.symlink_to(folder.name)
    with pytest.raises(OSError, match="symbolic links"):
        State(str(tmp_path)).keys()
    plugin = "import sys; from cni_plugin.main import main; sys.exit(main())"
    for command, code in (("CHECK", 100), ("GC", 101)):
        done = call(command, tmp_path, plugin)
        assert (done.returncode, json.loads(done.stdout)["code"]) == (1, code), done
    for command in ("ADD", "DEL", "STATUS"):
        check_passed_through(command, call(command, tmp_path, plugin))
