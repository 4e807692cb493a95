# SPDX-License-Identifier: Apache-2.0
"""The frozen plugin where nodes are odd: its files, folders, streams and limits.

Every call here has an environment of CNI's variables alone: no HOME, no PATH, no locale.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from cni_plugin import names
from tests.bed import open_bed
from tests.bed.bed import Bed
from tests.integration import plugin_calls
from tests.integration.plugin_calls import Sandbox
from tests.unit import cases


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with open_bed() as made:
        yield made


@pytest.fixture(scope="module")
def program() -> Iterator[Path]:
    """The plugin as it is installed: not below /tmp, wherever this repository may be."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        installed = Path(shutil.copytree(plugin_calls.PROGRAM.parent, Path(folder) / "plugin"))
        yield installed / plugin_calls.PROGRAM.name


@pytest.fixture
def pod(bed: Bed, program: Path) -> Iterator[Sandbox]:
    with plugin_calls.sandbox(bed, "odd") as sandbox:
        made = replace(sandbox, program=program)
        yield made
        made.call("GC")


def shell(script: str, *arguments: str | Path) -> list[str | Path]:
    """A wrapper that does ``script`` and then becomes the plugin."""
    return ["/bin/sh", "-euc", f'{script}\nshift {len(arguments)}\nexec "$@"', "sh", *arguments]


def own_mounts(script: str, *arguments: str | Path) -> list[str | Path]:
    """The same in a mount namespace of its own."""
    return ["/usr/bin/unshare", "--mount", "--propagation", "private", *shell(script, *arguments)]


READ_ONLY_ROOT = """
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount --bind "$1" "$1"
mount -o remount,bind,ro /
if touch /read-only-root 2>/dev/null; then exit 99; fi
"""
NOEXEC_TMP = """
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs -o noexec,nosuid,nodev tmpfs /tmp
cp /bin/true /tmp/
if /tmp/true 2>/dev/null; then exit 99; fi
"""
NO_TMP = """
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs tmpfs /mnt
for entry in /*; do
    case $entry in
    /tmp | /mnt) ;;
    *)
        if [ -L "$entry" ]; then
            cp -d "$entry" /mnt/
        elif [ -d "$entry" ]; then
            mkdir "/mnt$entry"
            mount --rbind "$entry" "/mnt$entry"
        fi
        ;;
    esac
done
test ! -e /mnt/tmp
shift
exec chroot /mnt "$@"
"""
DELETED_CWD = """
PATH=/usr/sbin:/usr/bin:/sbin:/bin
cd "$(mktemp -d "$1/cwd.XXXX")"
rmdir "$PWD"
"""

ODDITIES: dict[str, Callable[[Path], list[str | Path]]] = {
    "read-only root": lambda state: own_mounts(READ_ONLY_ROOT, state),
    "noexec /tmp": lambda _: own_mounts(NOEXEC_TMP),
    "no /tmp": lambda state: own_mounts(NO_TMP, state),
    "umask 077": lambda _: shell("umask 077"),
    "umask 777": lambda _: shell("umask 777"),
    "deleted working folder": lambda state: shell(DELETED_CWD, state.parent),
    "few descriptors": lambda _: shell("ulimit -n 24"),
    "Latin-1 locale": lambda _: shell("export LC_ALL=de_DE.ISO-8859-1"),
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_all_commands_work(pod: Sandbox, oddity: str) -> None:
    wrapper = ODDITIES[oddity](pod.bed.node.state_dir)
    answer = pod.call("ADD", wrapper)
    assert (answer.exit, answer.document) == (0, pod.result), answer
    assert pod.owners() == [pod.pod_id], answer.stderr
    for command in ("CHECK", "STATUS", "VERSION"):
        answer = pod.call(command, wrapper)
        assert answer.exit == 0, (command, answer)
    answer = pod.call("DEL", wrapper)
    assert (answer.exit, answer.stdout, answer.stderr) == (0, "", "")
    assert pod.leftovers() == []


def test_stdin_closed(pod: Sandbox) -> None:
    closed = shell("exec <&-")
    for command in ("ADD", "DEL", "CHECK", "GC", "STATUS"):
        answer = pod.call(command, closed)
        assert (answer.exit, answer.document["code"]) == (1, 5), answer
    assert pod.call("VERSION", closed).exit == 0


def test_stdout_closed(pod: Sandbox) -> None:
    """An answer that nobody can get is a failure; nothing of it lands in another file."""
    closed = shell("exec >&-")
    assert pod.call("ADD", closed).exit == 1
    assert pod.recorded()
    answer = pod.call("DEL", closed)
    assert (answer.exit, answer.stderr) == (0, "")
    assert pod.leftovers() == []


def test_stdout_full(pod: Sandbox) -> None:
    assert pod.call("ADD", shell("exec >/dev/full")).exit == 1
    assert pod.call("DEL", shell("exec >/dev/full")).exit == 0
    assert pod.leftovers() == []


def test_stderr_closed(pod: Sandbox) -> None:
    """What would be said goes nowhere, above all not into the record."""
    answer = pod.call("ADD", shell("exec 2>&-"))
    assert (answer.exit, answer.document) == (0, pod.result)
    assert pod.recorded()
    assert pod.call("CHECK").exit == 0
    answer = pod.call("DEL", shell("exec <&0 2>&-"))
    assert (answer.exit, answer.stdout) == (0, "")
    assert pod.leftovers() == []


def test_state_folder_is_private(pod: Sandbox) -> None:
    assert pod.call("ADD", shell("umask 000")).exit == 0
    folder = pod.bed.node.state_dir / names.ATTACHMENTS
    assert folder.stat().st_mode & 0o777 == 0o700
    assert pod.call("DEL").exit == 0


@contextmanager
def small_state(pod: Sandbox, options: str) -> Iterator[tuple[Sandbox, Path]]:
    """The pod's calls with a state folder that is a file system of its own."""
    folder = pod.bed.folder / "small"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield replace(pod, conf=(("stateDir", str(folder)),)), folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> None:
    """Until not a byte is left."""
    with (folder / "ballast").open("wb", buffering=0) as ballast:
        for size in (4096, 1):
            try:
                while True:
                    ballast.write(bytes(size))
            except OSError:
                continue


def test_state_folder_full_before_add(pod: Sandbox) -> None:
    with small_state(pod, "size=64k") as (odd, folder):
        fill(folder)
        answer = odd.call("ADD")
        assert (answer.exit, answer.document) == (0, pod.result)
        assert "not accelerated: OSError: [Errno 28] No space left on device" in answer.stderr
        assert pod.owners() == []
        assert cases.files_in(folder) == ["ballast"]
        assert odd.call("DEL").exit == 0


def test_state_folder_full_before_del(pod: Sandbox) -> None:
    with small_state(pod, "size=64k") as (odd, folder):
        assert odd.call("ADD").exit == 0
        assert pod.owners() == [pod.pod_id]
        fill(folder)
        assert odd.call("CHECK").exit == 0
        answer = odd.call("DEL")
        assert (answer.exit, answer.stderr) == (0, "")
        assert pod.owners() == []
        assert cases.files_in(folder) == ["ballast"]


def test_state_folder_without_inodes(pod: Sandbox) -> None:
    with small_state(pod, "nr_inodes=2") as (odd, folder):
        (folder / "ballast").touch()
        answer = odd.call("ADD")
        assert (answer.exit, answer.document) == (0, pod.result)
        assert "No space left on device" in answer.stderr
        assert pod.owners() == []
        assert odd.call("DEL").exit == 0


def test_state_folder_becomes_read_only(pod: Sandbox) -> None:
    """DEL cleans the kernel; the record that it cannot remove is GC's, once it can."""
    with small_state(pod, "size=64k") as (odd, folder):
        assert odd.call("ADD").exit == 0
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        answer = odd.call("DEL")
        assert (answer.exit, answer.stdout) == (0, "")
        assert "left for GC: OSError: [Errno 30] Read-only file system" in answer.stderr
        assert pod.owners() == []
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        assert odd.call("GC").exit == 0
        assert cases.files_in(folder) == []


@pytest.mark.parametrize("case", cases.all_cases(), ids=lambda case: case.name)
def test_fixture(case: cases.Case, tmp_path: Path) -> None:
    """The frozen program answers as the source tree does."""
    answer = case.run([str(plugin_calls.PROGRAM)], tmp_path)
    cases.check(case, answer, tmp_path)


def test_the_bundle_brings_no_compiler() -> None:
    files = [path for path in plugin_calls.PROGRAM.parent.rglob("*") if path.is_file()]
    assert not [path for path in files if re.search("bcc|llvm|clang|libbpf", path.name, re.I)]
    assert sum(path.stat().st_size for path in files) < 30e6
    assert plugin_calls.PROGRAM.stat().st_size < 4096  # is executed before all else


def test_schema_is_the_bundles_own(pod: Sandbox) -> None:
    """The frozen program reads the schema it was built with, not one that lies about."""
    bundled = plugin_calls.PROGRAM.parent / "_internal" / "conf" / "schema.json"
    source = cases.ROOT / "conf" / "schema.json"
    assert json.loads(bundled.read_text()) == json.loads(source.read_text())
    answer = replace(pod, conf=(("scope", "nowhere"),)).call("ADD")
    assert (answer.exit, answer.document) == (0, pod.result)
    assert "not accelerated: InvalidConfig: invalid configuration: scope" in answer.stderr
