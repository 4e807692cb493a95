# SPDX-License-Identifier: Apache-2.0
"""Nodes whose root holds little: a mount and a PID namespace with a root folder of their own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUSYBOX = Path("/bin/busybox")  # static
CONF_DIR, BIN_DIR = Path("/etc/cni/net.d"), Path("/opt/cni/bin")

# $1 the root, then folders to lend; it ends with its standard input. Nothing but busybox is sure to
# run after pivot_root.
_PROCESS_1 = """
mount --bind "$1" "$1"
cd "$1"
shift
for lent; do
    mkdir -p ".$lent"
    mount --bind "$lent" ".$lent"
done
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


@contextmanager
def running(root: Path, *lent: str) -> Iterator[Node]:
    """A node with this root, and folders of this machine; it ends on leaving."""
    unshare = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
    process = subprocess.Popen(
        [*unshare, "sh", "-ec", _PROCESS_1, "sh", root, *lent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:  # on leaving its standard input is closed, so it ends, and is waited for
        assert process.stdout is not None
        if process.stdout.readline() != b"\n":
            raise RuntimeError("the node's first process did not start; what it said is above")
        yield Node(root, process.pid)
