# SPDX-License-Identifier: Apache-2.0
"""Nodes whose root holds little: a mount and a PID namespace with a root folder of their own."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bed.apt import PrivateApt, debian_mirrors

BUSYBOX = Path("/bin/busybox")  # static
CONF_DIR, BIN_DIR = Path("/etc/cni/net.d"), Path("/opt/cni/bin")
WRITTEN = ("/tmp", "/run", "/opt/state")  # by programs, and the last one by tests' calls of ours
KINDS = ("busybox", "musl", "old glibc", "noexec")
_UNPACKED = Path(__file__).parents[2] / "build" / "roots"

# $1 the root; it ends with its standard input. Nothing but busybox is sure to run after pivot_root.
_PROCESS_1 = """
mount --bind "$1" "$1"
cd "$1"
mount -t proc proc proc
pivot_root . old
exec /bin/busybox sh -c 'umount -l /old && echo && exec cat'
"""


@dataclass(frozen=True)
class Node:
    """A node that runs; `root` is its root's folder, as it is without the node's mounts."""

    root: Path
    holder: int  # a process with the node's mounts and root, and its process 1's parent

    @property
    def proc(self) -> Path:
        """The node's /proc, as a pod's volume would show it."""
        return Path(f"/proc/{self.holder}/root/proc")

    @property
    def conf_dir(self) -> Path:
        return self.root / CONF_DIR.relative_to("/")

    @property
    def bin_dir(self) -> Path:
        return self.root / BIN_DIR.relative_to("/")

    def path(self, path: Path) -> Path:
        """What the node calls a file below its root."""
        return Path("/", path.relative_to(self.root))

    def call(
        self, *argv: str | Path, stdin: str = "", environment: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run what is on the node, by the node's busybox."""
        enter = ["nsenter", f"--mount={self.proc}/1/ns/mnt", f"--root={self.proc}/1/root", "--wd=/"]
        return subprocess.run(
            [*enter, "/bin/busybox", "env", "-i", *environment, *argv],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, *argv: str | Path) -> None:
        """One of busybox' programs. Raises RuntimeError when it fails."""
        done = self.call(BUSYBOX, *argv)
        if done.returncode:
            raise RuntimeError(f"{argv}: {done.stderr}")


def make(root: Path) -> None:
    """A root with busybox, the folders of CNI, and nothing else."""
    for folder in ("bin", "proc", "old", CONF_DIR.relative_to("/"), BIN_DIR.relative_to("/")):
        (root / folder).mkdir(parents=True)
    shutil.copy(BUSYBOX, root / "bin")
    (root / "bin" / "sh").symlink_to("busybox")


def _lay(package: str, root: Path) -> None:
    """Copies the libraries of a Debian 11 package. Its folders are not yet merged into /usr."""
    unpacked = _UNPACKED / package
    if not unpacked.exists():
        archive, _ = debian_mirrors(None)
        apt = PrivateApt(_UNPACKED / "apt", [f"deb {archive} bullseye main"])
        apt.update()
        apt.unpack([package], unpacked)
    for folder in unpacked.glob("lib*"):
        shutil.copytree(folder, root / folder.name, symlinks=True, dirs_exist_ok=True)


def _make_old_glibc(root: Path) -> None:
    """Debian 11's without the versions after 2.27, Ubuntu 18.04's, and with a library preloaded."""
    for package in ("libc6", "zlib1g"):
        _lay(package, root)
    for library in root.glob("lib/*/lib*-2.31.so"):
        newer = re.compile(rb"GLIBC_2\.(28|29|3\d)\0")
        library.write_bytes(newer.sub(b"GLIBC_none\0", library.read_bytes()))
    (library,) = root.glob("lib/*/libm.so.6")
    (root / "etc/ld.so.preload").write_text(f"/{library.relative_to(root)}\n")


@contextmanager
def running_kind(root: Path, kind: str) -> Iterator[Node]:
    """A node with a new root of one of KINDS; it ends on leaving."""
    make(root)
    if kind == "musl":
        _lay("musl", root)
    elif kind == "old glibc":
        _make_old_glibc(root)
    with running(root) as node:
        if kind == "noexec":
            for folder in WRITTEN:
                node.run("mkdir", folder)
                node.run("mount", "-t", "tmpfs", "-o", "noexec", "none", folder)
        yield node


@contextmanager
def running(root: Path) -> Iterator[Node]:
    """A node with this root; it ends on leaving."""
    unshare = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
    process = subprocess.Popen(
        [*unshare, "sh", "-ec", _PROCESS_1, "sh", root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:  # on leaving its standard input is closed, so it ends, and is waited for
        assert process.stdout is not None
        if process.stdout.readline() != b"\n":
            raise RuntimeError("the node's first process did not start; what it said is above")
        yield Node(root, process.pid)
