# SPDX-License-Identifier: Apache-2.0
"""A Debian that has never seen this project: a root folder in namespaces of its own.

It has what a minimal installation has, and make, git and ca-certificates. Its mounts, processes
and cgroups are its own and end with it; its kernel and its network are this machine's. How it
reaches Debian's archive and PyPI is this machine's own configuration of apt and pip.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.bed import cgroups, sweep
from tests.bed.apt import KEYRING, AptError, debian_mirrors
from tests.bed.bed import REPOSITORY
from tests.image.dockerfile import LENT, PATH

Argv = Sequence[str | Path]

BARE = "--include=make,git,ca-certificates"
END_PATIENCE_S = 120  # what was killed may need the CPU to go
CLONE = Path("/root/tcpip-bypass")
CERTIFICATES = Path("/usr/local/share/ca-certificates")  # what Debian's ca-certificates adds
# Copied as they are, where they are there.
CONFIGURATION = (
    Path("/etc/hosts"),
    Path("/etc/resolv.conf"),
    Path("/etc/apt/auth.conf"),
    Path("/etc/apt/auth.conf.d"),
    Path("/etc/pip.conf"),
    Path("/etc/xdg/pip"),
    Path("/root/.config/pip"),
    Path("/root/.pip"),
    CERTIFICATES,
)
ACQUIRE = ("http", "https", "ftp", "Retries", "Check-Date", "Check-Valid-Until", "ForceIPv4")

# $1 lower folder, $2 upper, $3 work, $4 where to mount, $5 folders to lend; then the command. All
# of it goes with the namespaces that this is started in. pivot_root, not chroot: who enters this
# mount namespace must find this root.
_RUN = """
mount -t overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" bare "$4"
cd "$4"
for lent in $5; do
    mkdir -p ".$lent"
    mount --bind "$lent" ".$lent"
    mount -o remount,bind,ro ".$lent"
done
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t bpf bpf sys/fs/bpf
mount --rbind /dev dev
mount -t tmpfs -o mode=755 run run
mkdir -p mnt/outside
pivot_root . mnt/outside
umount --lazy /mnt/outside
shift 5
exec "$@"
"""


class BareError(Exception):
    """A machine could not be made, or a step on it has failed; the message says which."""


@dataclass(frozen=True)
class Log:
    """Everything that is printed, and what a person is told meanwhile."""

    file: BinaryIO
    name: str

    def tell(self, line: str) -> None:
        """Both to the person and into the log."""
        stamped = f"{time.strftime('%H:%M:%S')} {self.name}: {line}"
        print(stamped, flush=True)
        self.file.write(f"=== {stamped}\n".encode())
        self.file.flush()

    def run(self, argv: Argv, environment: dict[str, str] | None = None) -> None:
        """Run a program to its end. Raises BareError when it fails."""
        done = subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode:
            raise BareError(f"{argv[-1]!r} ended with {done.returncode}")


@dataclass(frozen=True)
class Machine:
    """One that is made; every command starts its namespaces anew and finds the files of before."""

    base: Path
    folder: Path
    cgroup: Path
    log: Log

    def run(self, command: str) -> None:
        """A shell's command, in the clone. Raises BareError when it fails."""
        overlay = [self.base, *(self.folder / each for each in ("upper", "work", "root"))]
        # --kill-child: process 1 of the PID namespace, and so all of it, ends with this program.
        unshare = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child"]
        enter = f'echo $$ >"{self.cgroup}/cgroup.procs"; exec "$@"'
        self.log.run(
            [
                *("sh", "-ec", enter, "sh"),
                *unshare,
                *("--cgroup", "sh", "-ec", _RUN, "sh"),
                *overlay,
                " ".join(map(str, pip_folders())),
                *("sh", "-ec", f"cd {CLONE}; {command}"),
            ],
            {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
            | {key: value for key, value in os.environ.items() if key.startswith(LENT)},
        )


def base(store: Path, suite: str, mirror: str | None, log: Log) -> Path:
    """A minimal installation, never started; kept, since it takes minutes."""
    folder = store / suite
    if not folder.exists():
        log.tell("installing it")
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        archive, _ = _mirrors(mirror)
        log.run(
            ["debootstrap", "--variant=minbase", BARE, f"--keyring={KEYRING}", suite, part, archive]
        )
        part.rename(folder)
    return folder


@contextmanager
def bare_machine(
    store: Path, below: Path, suite: str, mirror: str | None, log: Log
) -> Iterator[Machine]:
    """A machine with a clean clone of HEAD; on leaving nothing of it is left."""
    folder = Path(tempfile.mkdtemp(prefix=f"{suite}-", dir=store))
    cgroup = cgroups.mount_point() / f"setup-test-{os.getpid()}"
    try:
        for each in ("upper", "work", "root"):
            (folder / each).mkdir()
        cgroup.mkdir()
        upper = folder / "upper"
        _configure(upper, suite, _mirrors(mirror))
        clone = upper / CLONE.relative_to("/")
        log.run(["git", "clone", "--quiet", f"file://{REPOSITORY}", clone])
        machine = Machine(below, folder, cgroup, log)
        machine.run("update-ca-certificates")
        yield machine
    finally:
        with sweep.uninterrupted():
            try:
                cgroups.remove(cgroup, END_PATIENCE_S)
            finally:
                shutil.rmtree(folder)


def _mirrors(mirror: str | None) -> tuple[str, str]:
    """Debian's archive and security archive; raises BareError."""
    try:
        return debian_mirrors(mirror)
    except AptError as error:
        raise BareError(str(error)) from error


def _configure(root: Path, suite: str, mirrors: tuple[str, str]) -> None:
    """apt, pip and certificates as this machine has them, and this suite's sources."""
    for path in CONFIGURATION:
        copy = root / path.relative_to("/")
        if path.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
    apt = root / "etc/apt"
    (apt / "apt.conf.d").mkdir(parents=True, exist_ok=True)
    keys = [f"Acquire::{key}" for key in ACQUIRE]
    dump = ["apt-config", "dump", "--no-empty", "--format", '%F "%v";%n', *keys]
    settings = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    (apt / "apt.conf.d" / "99this-machine").write_text(settings)
    archive, security = mirrors
    (apt / "sources.list").write_text(
        f"deb {archive} {suite} main\n"
        f"deb {archive} {suite}-updates main\n"
        f"deb {security} {suite}-security main\n"
    )


def pip_folders() -> list[Path]:
    """Folders of packages on this machine that pip is configured to look into."""
    listing = subprocess.run(
        [REPOSITORY / ".venv/bin/pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    # An index refers to packages in folders beside it.
    indexes = {Path(path).parent for path in re.findall(r"file://(/[^\s']+)", listing)}
    plain = {Path(path) for path in re.findall(r"(?<=[\s'])/[^\s']+", listing)}
    return sorted(path for path in indexes | plain if path.is_dir())
