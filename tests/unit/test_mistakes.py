# SPDX-License-Identifier: Apache-2.0
"""Our own mistakes, and damage to our program: pods start and end, and no traceback is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cni_plugin import names
from cni_plugin.state import Attachment, Key, State
from tests.bed.bed import FROZEN_PLUGIN
from tests.unit.cases import ROOT

RESULT = {"cniVersion": "1.1.0", "ips": [{"address": "10.22.0.7/16"}]}
COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS")
# What the commands import, and what a frozen program may have lost.
MODULES = (
    *("_ctypes", "fcntl", "ipaddress", "select", "zlib", "jsonschema", "pyroute2"),
    *("cni_plugin.add", "cni_plugin.attachment", "cni_plugin.policy", "cni_plugin.schema"),
    *("cni_plugin.delete", "cni_plugin.status", "cni_plugin.state", "cni_plugin.cgroup"),
)
IGNORING = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""
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
            **{"CNI_NETNS": "/", "CNI_PATH": "/no/such"},
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
    for command in ("ADD", "DEL", "CHECK", "STATUS"):
        check_passed_through(command, call(command, tmp_path, WITHOUT, module))


def spoil(file: Path) -> None:
    """All but the ends, of which PyInstaller's archive is known."""
    data = file.read_bytes()
    file.write_bytes(data[:8192] + bytes(len(data) - 8192 - 65536) + data[-65536:])


def leave_the_starter(folder: Path) -> None:
    shutil.rmtree(folder / "_internal")
    for name in ("ld-glibc.so.2", "plugin"):
        (folder / name).unlink()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "removed": leave_the_starter,
    "no loader": lambda folder: (folder / "ld-glibc.so.2").unlink(),
    "no plugin": lambda folder: (folder / "plugin").unlink(),
    "plugin cut off": lambda folder: os.truncate(folder / "plugin", 100_000),
    "plugin spoilt": lambda folder: spoil(folder / "plugin"),
    "no library": lambda folder: next((folder / "_internal").glob("libpython*")).unlink(),
    "no modules": lambda folder: (folder / "_internal" / "base_library.zip").unlink(),
}


def frozen(folder: Path, command: str, stdin: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [folder / names.PLUGIN],
        env={"CNI_COMMAND": command, "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0"},
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_plugin_cannot_run(damage: str, tmp_path: Path) -> None:
    """Its folder is damaged, or was removed: start.c answers as a plugin that does nothing."""
    folder = shutil.copytree(FROZEN_PLUGIN, tmp_path / "plugin")
    DAMAGE[damage](folder)
    conf = json.dumps({"cniVersion": "1.1.0", "name": "pods", "prevResult": RESULT})
    for command in COMMANDS:
        done = frozen(folder, command, conf)
        check_passed_through(command, done)
        assert "warning: it cannot run" in done.stderr
    done = frozen(folder, "VERSION", "")
    assert json.loads(done.stdout)["supportedVersions"] == list(names.CNI_VERSIONS)
    for command, stdin, code in (
        ("ADD", "{}", 11),
        ("ADD", "", 11),
        ("OTHER", conf, 4),
        ("", "", 4),
    ):
        done = frozen(folder, command, stdin)
        answer = json.loads(done.stdout)
        assert (done.returncode, answer["code"]) == (1, code)
        advice = "take its entry out of the network configuration"
        assert (advice in answer["msg"]) == (code == 11)


def test_a_runtime_that_ignores_its_childrens_ends() -> None:
    done = subprocess.run(
        ["python3", "-c", IGNORING, FROZEN_PLUGIN / names.PLUGIN],
        env={**os.environ, "CNI_COMMAND": "VERSION"},
        input="{}",
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stderr, "supportedVersions" in json.loads(done.stdout)) == ("", True)


@pytest.mark.parametrize("end", ["exit 7", "kill -SEGV $$"])
def test_the_plugin_dies_when_it_has_read_the_call(end: str, tmp_path: Path) -> None:
    shutil.copy(FROZEN_PLUGIN / names.PLUGIN, tmp_path)
    loader = tmp_path / "ld-glibc.so.2"
    loader.write_text(f"#!/bin/sh\ncat >/dev/null\n{end}\n")
    loader.chmod(0o755)
    fill = "x" * 200_000  # more than a pipe holds
    conf = json.dumps({"cniVersion": "1.1.0", "fill": fill, "prevResult": RESULT})
    for command in COMMANDS:
        done = frozen(tmp_path, command, conf)
        check_passed_through(command, done)
    whole = json.dumps({"prevResult": {"a": "x" * 2**20}})
    assert json.loads(frozen(tmp_path, "ADD", whole).stdout)["code"] == 11, "too long for start.c"


def test_the_plugin_is_killed(tmp_path: Path) -> None:
    """For want of memory, say. The runtime calls ADD again; the others need no second call."""
    shutil.copy(FROZEN_PLUGIN / names.PLUGIN, tmp_path)
    loader = tmp_path / "ld-glibc.so.2"
    loader.write_text("#!/bin/sh\nkill -9 $$\n")
    loader.chmod(0o755)
    assert frozen(tmp_path, "ADD", "{}").returncode == -signal.SIGKILL
    for command in ("DEL", "CHECK", "GC", "STATUS", "VERSION"):
        assert frozen(tmp_path, command, "{}").returncode == 0


def test_the_answer_cannot_be_written(tmp_path: Path) -> None:
    starter = shutil.copy(FROZEN_PLUGIN / names.PLUGIN, tmp_path)
    for command, code in (("ADD", 1), ("DEL", 0)):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [starter],
                env={"CNI_COMMAND": command},
                input=json.dumps({"prevResult": RESULT}).encode(),
                stdout=full,
                check=False,
            )
        assert done.returncode == code


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_plugin_ends_with_what_the_runtime_has_started() -> None:
    with subprocess.Popen(
        [FROZEN_PLUGIN / names.PLUGIN],
        env={"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0"},
        stdin=subprocess.PIPE,
    ) as started:
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
        wait_until(lambda: children.read_text() != "")
        child = Path("/proc", children.read_text().strip())
        wait_until(lambda: b"plugin" in (child / "cmdline").read_bytes())
        started.kill()
        wait_until(lambda: not child.exists())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_of_ours(command: str, tmp_path: Path) -> None:
    done = call(command, tmp_path, MISTAKEN)
    if command != "GC":
        check_passed_through(command, done)
        assert "warning: internal error: RuntimeError" in done.stderr
        return
    answer: Any = json.loads(done.stdout)
    assert (done.returncode, answer["code"]) == (1, 999)
    assert answer["msg"] == "internal error: RuntimeError"


def test_a_record_that_a_failed_add_has_left_is_not_checked(tmp_path: Path) -> None:
    state, key = State(str(tmp_path)), Key("c", "eth0")
    state.make()
    pod = ("pods", "/", "shop", "cart", "uid")
    state.write(Attachment(*key, *pod, "/no/such/cgroup", 1, 1, 1, "gen-1", 0, 0, [], []))
    plugin = "import sys; from cni_plugin.main import main; sys.exit(main())"
    done = call("CHECK", tmp_path, plugin)
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 100), done
    state.note_failure(key, "shop", "cart", "the kernel refused it")
    check_passed_through("CHECK", call("CHECK", tmp_path, plugin))


def test_what_is_recorded_cannot_be_read(tmp_path: Path) -> None:
    """An error for those who asked what is there; nothing that keeps a pod from ending."""
    folder = tmp_path / names.ATTACHMENTS
    folder.symlink_to(folder.name)
    with pytest.raises(OSError, match="symbolic links"):
        State(str(tmp_path)).keys()
    plugin = "import sys; from cni_plugin.main import main; sys.exit(main())"
    done = call("GC", tmp_path, plugin)
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 101), done
    for command in ("ADD", "DEL", "CHECK", "STATUS"):
        check_passed_through(command, call(command, tmp_path, plugin))
