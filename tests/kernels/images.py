# SPDX-License-Identifier: Apache-2.0
"""What to boot, and what to boot it with: Debian's kernels and a QEMU, cached in a folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bed.apt import KEYRING, AptError, PrivateApt, debian_mirrors, os_release
from tests.kernels import modules

# The newest package of each series: the floor, the long-lived ones, those in which FIONREAD on a
# socket in a sockhash changed (6.17, 6.18), and the newest. And two that do not let FIONREAD be
# mended: as Secure Boot has it, and with threads preempted anywhere in the kernel.
SERIES = ("5.10", "6.1", "6.1-lockdown", "6.12", "6.12-preempt", "6.17", "6.18", "7")
_PARAMETERS = {"": "", "lockdown": "lockdown=integrity", "preempt": "preempt=full"}
_SUITES = ("bullseye", "bookworm", "trixie", "trixie-backports")
_SECURITY_SUITES = ("bullseye-security", "bookworm-security", "trixie-security")

# The "cloud" flavour is the smallest. From 6.19 on the kernel is in linux-binary-*, its modules in
# linux-modules-*, and linux-image-* is an empty package.
_NAME = re.compile(r"linux-(image|binary)-(?P<release>\d+\.\d+\.\d[\w.+~-]*-cloud-amd64)")

# QEMU 7.2 corrupts guests when it emulates cmpxchg16b.
_OLDEST_QEMU = 8


def plain(series: str) -> str:
    """The series without what it is booted with."""
    return series.partition("-")[0]


@dataclass(frozen=True)
class Kernel:
    """A kernel on disk. The folder bears its release, as uname -r has it."""

    series: str
    folder: Path

    @property
    def release(self) -> str:
        return self.folder.name

    @property
    def is_too_old(self) -> bool:
        """Whether no process can be visited, so that the mode is `off`."""
        return tuple(map(int, plain(self.series).split("."))) < (6, 1)

    @property
    def parameters(self) -> str:
        """What its command line has beside what every kernel's has."""
        return _PARAMETERS[self.series.partition("-")[2]]

    @property
    def title(self) -> str:
        """What tells it from all other kernels of a run."""
        return f"{self.release} {self.parameters}".strip()

    @property
    def image(self) -> Path:
        return self.folder / "vmlinuz"

    @property
    def modules(self) -> Path:
        """The folder of modules in the order in which they are to be loaded."""
        return self.folder / "modules"


@dataclass(frozen=True)
class Qemu:
    """An emulator: the machine's own, or one unpacked below `root`, which brings libraries and
    firmware."""

    program: Path
    root: Path | None = None

    def command(self) -> list[str]:
        folders = ("usr/share/qemu", "usr/share/seabios") if self.root else ()
        return [str(self.program)] + [
            word for one in folders for word in ("-L", f"{self.root}/{one}")
        ]

    def environment(self) -> dict[str, str]:
        if not self.root:
            return dict(os.environ)
        folders = [*self.root.glob("usr/lib/*-linux-gnu"), *self.root.glob("lib/*-linux-gnu")]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(str(folder) for folder in folders)}


def _numbers(release: str) -> tuple[int, ...]:
    """What releases are ordered by: (6, 1, 0, 56) for 6.1.0-56-cloud-amd64."""
    return tuple(int(number) for number in re.findall(r"\d+", release.removesuffix("-cloud-amd64")))


def _in_series(release: str, series: str) -> bool:
    wanted = _numbers(series)
    return _numbers(release)[: len(wanted)] == wanted


def _cached(folder: Path, series: str) -> Kernel | None:
    for path in (folder / series).glob("*"):
        kernel = Kernel(series, path)
        return kernel if modules.has_stored(kernel.modules) else None
    return None


def get_kernels(folder: Path, series: Sequence[str], mirror: str | None) -> list[Kernel]:
    """The newest kernel of each series, downloaded into `folder` unless one is there already.

    Raises AptError, also when the mirror has no kernel of a series.
    """
    wanted = list(dict.fromkeys(map(plain, series)))
    found = {kernel.series: kernel for kernel in _get(folder, wanted, mirror)}
    return [replace(found[plain(name)], series=name) for name in series]


def _get(folder: Path, series: Sequence[str], mirror: str | None) -> list[Kernel]:
    found = [_cached(folder, one) for one in series]
    if None not in found:
        return [kernel for kernel in found if kernel]
    archive, security = debian_mirrors(mirror)
    apt = PrivateApt(
        folder.with_name("apt-images"),
        [f"deb [signed-by={KEYRING}] {archive} {suite} main" for suite in _SUITES]
        + [f"deb [signed-by={KEYRING}] {security} {suite} main" for suite in _SECURITY_SUITES],
    )
    apt.update()
    packages = frozenset(apt.names("^linux-.*-cloud-amd64$"))
    return [
        kernel or _download(apt, packages, folder / one)
        for one, kernel in zip(series, found, strict=True)
    ]


def newest(available: frozenset[str], series: str) -> tuple[str, list[str]]:
    """The newest release of a series, and the packages that hold its kernel and modules.

    Raises AptError if there is none that `available` has whole.
    """
    releases = {match["release"] for name in available if (match := _NAME.fullmatch(name))}
    usable = [one for one in releases if _in_series(one, series) and _packages_of(one, available)]
    if not usable:
        raise AptError(f"the mirror has no kernel {series} with its modules")
    release = max(usable, key=_numbers)
    return release, _packages_of(release, available)


def _packages_of(release: str, available: frozenset[str]) -> list[str]:
    split = [f"linux-binary-{release}", f"linux-modules-{release}"]
    if split[0] in available:
        return split if split[1] in available else []
    return [f"linux-image-{release}"]


def _download(apt: PrivateApt, available: frozenset[str], folder: Path) -> Kernel:
    series = folder.name
    release, packages = newest(available, series)
    with tempfile.TemporaryDirectory(dir=folder.parents[1]) as scratch:
        tree = Path(scratch) / "tree"
        apt.unpack(packages, tree)
        images = [*tree.glob("boot/vmlinuz-*"), *tree.glob("usr/lib/modules/*/vmlinuz")]
        if not images:
            raise AptError(f"the packages of kernel {release} hold no kernel")
        made = Path(scratch) / release
        modules.store(tree, made / "modules")
        images[0].rename(made / "vmlinuz")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return Kernel(series, made.rename(folder / release))


def get_qemu(folder: Path, mirror: str | None) -> Qemu:
    """A QEMU that can be trusted, with the libraries this machine lacks, unpacked into `folder`
    unless it is there already. Raises AptError."""
    root = folder.resolve() / "qemu"
    program = root / "usr/bin/qemu-system-x86_64"
    if not root.exists():
        release, sources, suite = os_release(), [], None
        if release.get("VERSION_CODENAME") == "bookworm":
            suite = "bookworm-backports"
            sources = [f"deb [signed-by={KEYRING}] {debian_mirrors(mirror)[0]} {suite} main"]
        apt = PrivateApt(folder / "apt-qemu", sources, on_top_of_machine=True)
        apt.update()
        apt.unpack_with_dependencies("qemu-system-x86", suite, root)
    qemu = Qemu(program, root) if program.exists() else Qemu(Path("/usr/bin/qemu-system-x86_64"))
    said = subprocess.run(
        [*qemu.command(), "--version"],
        env=qemu.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"version (\d+)", said.stdout)
    if not found:
        raise AptError(f"{qemu.program} does not run: {said.stderr.strip()}")
    if int(found[1]) < _OLDEST_QEMU:
        raise AptError(f"QEMU {found[1]} corrupts its guests; {_OLDEST_QEMU} or newer is needed")
    return qemu
