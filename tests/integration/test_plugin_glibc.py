# SPDX-License-Identifier: Apache-2.0
"""The plugin as it is shipped: frozen on Debian 11, so that it runs on nodes as old as that."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bed import open_bed
from tests.bed.bed import REPOSITORY
from tests.integration import plugin_calls

FREEZE = REPOSITORY / "install" / "image" / "freeze.sh"
FOLDER = REPOSITORY / "build" / "freeze"
FLOOR = (2, 31)  # Ubuntu 20.04 and Debian 11


@pytest.fixture(scope="module")
def bundle() -> Path:
    """Frozen from the source as it is now; the first time makes a Debian 11, in two minutes."""
    subprocess.run([FREEZE, FOLDER], check=True, timeout=900)
    return FOLDER / "tcpip-bypass"


def glibc_versions(program: Path) -> set[tuple[int, ...]]:
    """The glibc versions whose symbols an ELF file asks for; empty for any other file."""
    if program.read_bytes()[:4] != b"\x7fELF":
        return set()
    listing = subprocess.run(
        ["objdump", "-p", program], capture_output=True, text=True, check=True
    ).stdout
    needed = listing.partition("Version References:")[2]
    return {
        tuple(map(int, version.split(".")))
        for version in re.findall(r"\bGLIBC_(\d+(?:\.\d+)+)", needed)
    }


def test_the_reader_sees_versions() -> None:
    """Of this machine's own C library user, which has some."""
    assert (2, 2, 5) in glibc_versions(Path("/bin/ls")) or (2, 17) in glibc_versions(
        Path("/bin/ls")
    )


def test_no_symbol_is_newer_than_the_floor(bundle: Path) -> None:
    files = {path: glibc_versions(path) for path in bundle.rglob("*") if path.is_file()}
    elf = {path: versions for path, versions in files.items() if versions}
    assert bundle / "plugin" in elf
    assert len(elf) > 5
    newest = {path.name: max(versions) for path, versions in elf.items()}
    print(f"highest of {len(elf)} files: {max(newest.values())}")
    assert {name: version for name, version in newest.items() if version > FLOOR} == {}


def test_the_bundle_brings_no_compiler(bundle: Path) -> None:
    names = [path.name for path in bundle.rglob("*")]
    assert not [name for name in names if re.search("bcc|llvm|clang|libbpf", name, re.I)]
    assert sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) < 30e6


def test_it_runs_on_debian_11(bundle: Path) -> None:
    root = FOLDER / "root"
    subprocess.run(["cp", "-r", bundle, root / "opt"], check=True)
    answer = subprocess.run(
        ["/usr/sbin/chroot", root, "/opt/tcpip-bypass/tcpip-bypass"],
        env={"CNI_COMMAND": "VERSION"},
        input=b'{"cniVersion": "0.4.0"}',
        capture_output=True,
        check=True,
    )
    assert b'"cniVersion": "0.4.0"' in answer.stdout


def test_it_runs_here(bundle: Path) -> None:
    """All the commands, with Python 3.9's libraries on this machine's newer glibc."""
    with open_bed() as bed, plugin_calls.sandbox(bed, "old") as made:
        pod = replace(made, program=bundle / "tcpip-bypass")
        assert pod.call("ADD").document == pod.result
        assert pod.owners() == [pod.pod_id]
        for command in ("CHECK", "STATUS", "VERSION", "DEL", "GC"):
            assert pod.call(command).exit == 0
        assert pod.leftovers() == []
