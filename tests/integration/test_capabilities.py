# SPDX-License-Identifier: Apache-2.0
"""The capabilities of daemonset.yaml: with them the node program does all its work, and with any
one less a part of it fails, which part is in NEEDED. docs/deploy.md has the same as a table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import capabilities, manifests
from tests.bed import open_bed
from tests.bed.bed import FROZEN_PLUGIN, REPOSITORY, Bed
from tests.bed.node import PROGRAM, is_report

GRANTED = manifests.capabilities(manifests.documents(manifests.DAEMONSET))
Argv = list[str | Path]
NOBODY = 65534
CONFLIST = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}]}


@dataclass(frozen=True)
class Done:
    """Whether the work was done, and what was said if not."""

    done: bool
    said: str


@dataclass(frozen=True)
class Scratch:
    """A node's places, and a /proc whose process 1 has the node's mount namespace."""

    bed: Bed
    proc: Path

    def call(self, names: frozenset[str], *argv: str | Path, reporting: str = "") -> Done:
        """Run a program with these capabilities only.

        reporting: the node program's command that it is, whose exit status may be an answer.
        """
        done = subprocess.run(
            [*capabilities.with_only(names), *argv],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
            check=False,
        )
        document = done.stdout if done.stdout.startswith("{") else ""
        reported = is_report(reporting, done.returncode, document)
        return Done(done.returncode == 0 or reported, done.stdout)

    def program(self, names: frozenset[str], command: str, *options: str | Path) -> Done:
        """A command of the node program."""
        node = self.bed.node
        places: Argv = ["--bpffs", node.bpffs, "--state-dir", node.state_dir]
        return self.call(names, PROGRAM, command, *options, *places, reporting=command)


def load(scratch: Scratch, names: frozenset[str]) -> Done:
    """The programs compiled, loaded and pinned."""
    return scratch.program(names, "load")


def try_kernel(scratch: Scratch, names: frozenset[str]) -> Done:
    """A self-test that finds anything but `off`."""
    answer = scratch.program(names, "selftest", "--json")
    _, found, verdict_text = answer.said.rpartition("\n{\n")  # after what libbpf said
    if not found and not answer.done:
        return answer
    verdict = json.loads("{\n" + verdict_text if found else answer.said)
    return Done(verdict["mode"] != "off", answer.said)


def mount_bpffs(scratch: Scratch, names: frozenset[str]) -> Done:
    """A bpffs in the node's mount namespace, as the agent mounts it."""
    mount: Argv = [
        sys.executable,
        "-m",
        "install.program.agent.bpffs",
        scratch.bed.folder / "bpffs",
    ]
    return scratch.call(names, *mount, scratch.proc / "1/ns/mnt")


def install(scratch: Scratch, names: frozenset[str]) -> Done:
    """The plugin, tried on the node, and our entry in a conflist that is another user's."""
    conf_dir = scratch.bed.folder / "net.d"
    conflist = conf_dir / "10-pods.conflist"
    bin_dir = scratch.bed.folder / "bin"
    for folder in (conf_dir, bin_dir):
        folder.mkdir(exist_ok=True)
    (bin_dir / "bridge").touch()
    conflist.write_text(json.dumps(CONFLIST))
    conflist.chmod(0o600)
    for path in (conf_dir, conflist):
        os.chown(path, NOBODY, NOBODY)
    places: Argv = ["--cni-conf-dir", conf_dir, "--cni-bin-dir", bin_dir]
    places += ["--host-proc", scratch.proc, "--plugin-dir", FROZEN_PLUGIN]
    answer = scratch.program(names, "install", *places)
    if answer.done:
        status = conflist.stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (NOBODY, NOBODY, 0o600)
    return answer


Work = Callable[[Scratch, frozenset[str]], Done]

# Each capability: what cannot be done without it, and what is then said.
NEEDED = {
    "CHOWN": (install, "Operation not permitted"),
    "DAC_OVERRIDE": (install, "Permission denied"),
    "NET_ADMIN": (try_kernel, "Operation not permitted"),
    "SYS_ADMIN": (load, "Operation not permitted"),
    "SYS_CHROOT": (mount_bpffs, "Operation not permitted"),
    "SYS_PTRACE": (mount_bpffs, "Permission denied"),
}


@pytest.fixture(scope="module")
def scratch() -> Iterator[Scratch]:
    with open_bed(bypass=False) as bed:
        (bed.folder / "bpffs").mkdir()
        unshare = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        process_1 = ["sh", "-ec", "mount -t proc proc /proc; echo; exec cat"]
        holder = subprocess.Popen(
            [*unshare, *process_1], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with holder:  # ends with its standard input
            assert holder.stdout is not None
            holder.stdout.readline()
            yield Scratch(bed, Path(f"/proc/{holder.pid}/root/proc"))
        bed.node.call("unload")


def test_every_capability_is_accounted_for() -> None:
    assert NEEDED.keys() == GRANTED


@pytest.mark.parametrize("work", [load, try_kernel, mount_bpffs, install])
def test_they_are_enough(scratch: Scratch, work: Work) -> None:
    answer = work(scratch, GRANTED)
    assert answer.done, answer.said


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_none_can_be_spared(scratch: Scratch, name: str) -> None:
    work, complaint = NEEDED[name]
    answer = work(scratch, GRANTED - {name})
    assert not answer.done
    assert complaint in answer.said


@pytest.mark.parametrize("name", ["SYS_ADMIN", "SYS_CHROOT", "SYS_PTRACE"])
def test_a_plugin_that_cannot_be_tried_is_not_installed(scratch: Scratch, name: str) -> None:
    shutil.rmtree(scratch.bed.folder / "bin", ignore_errors=True)
    answer = install(scratch, GRANTED - {name})
    assert not answer.done
    assert "could not be tried" in answer.said
    assert json.loads((scratch.bed.folder / "net.d/10-pods.conflist").read_text()) == CONFLIST
