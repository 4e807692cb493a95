# SPDX-License-Identifier: Apache-2.0
"""Packages from the machine's own Debian mirror, without touching what is installed.

A private apt configuration: own package lists and archive, extra suites, packages unpacked with
dpkg-deb. Proxies and the like stay as the machine's apt has them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class AptError(Exception):
    """apt found no mirror, or could not download; the message holds what it said."""


def os_release() -> dict[str, str]:
    """/etc/os-release as a dictionary."""
    lines = Path("/etc/os-release").read_text().splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line)
    return {name: value.strip('"') for name, _, value in pairs}


def debian_mirrors(mirror: str | None) -> tuple[str, str]:
    """(archive, security archive): where `mirror` says, or where this machine's apt has them."""
    if mirror:
        return mirror.rstrip("/"), mirror.rstrip("/") + "-security"
    release = os_release()
    codename = release.get("VERSION_CODENAME", "")
    targets = _run(
        ["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"]
    )
    found = dict(line.split() for line in targets.splitlines())
    if release.get("ID") != "debian" or codename not in found:
        raise AptError("this machine's apt knows no Debian mirror to take packages from; name one")
    archive = found[codename].rstrip("/")
    return archive, found.get(f"{codename}-security", archive + "-security").rstrip("/")


def _run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        said = "\n".join((done.stderr or done.stdout).splitlines()[-10:])
        raise AptError(f"{' '.join(command[:1] + command[-2:])} failed:\n{said}")
    return done.stdout


class PrivateApt:
    """One private apt configuration below `folder`.

    Either of nothing but the one-line `sources`, or, `on_top_of_machine`, of the machine's sources
    and these, knowing what the machine has installed.
    """

    def __init__(
        self, folder: Path, sources: list[str], *, on_top_of_machine: bool = False
    ) -> None:
        self._folder = folder.resolve()
        for name in ("lists/partial", "cache/archives/partial", "none"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        none = self._folder / "none"
        machine_list = Path("/etc/apt/sources.list")
        listing = self._folder / "sources.list"
        listing.write_text(
            (machine_list.read_text() if on_top_of_machine and machine_list.exists() else "")
            + "".join(f"{line}\n" for line in sources)
        )
        settings = {
            "Dir::Etc::SourceList": listing,
            "Dir::Etc::SourceParts": "/etc/apt/sources.list.d" if on_top_of_machine else none,
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": none,
            "Dir::State::Lists": self._folder / "lists",
            "Dir::Cache": self._folder / "cache",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
            "APT::Update::Post-Invoke": "",
        }
        if not on_top_of_machine:
            (self._folder / "status").touch()
            settings["Dir::State::Status"] = self._folder / "status"
        self._options = [f"-o{name}={value}" for name, value in settings.items()]

    def update(self) -> None:
        """Fetches the package lists. Raises AptError."""
        _run(["apt-get", *self._options, "-q", "update"])

    def names(self, pattern: str) -> list[str]:
        """The packages whose name matches the regular expression."""
        found = _run(["apt-cache", *self._options, "search", "--names-only", pattern])
        return [line.split()[0] for line in found.splitlines()]

    def versions(self, package: str) -> list[str]:
        """Every version that could be downloaded, the newest first."""
        listed = _run(["apt-cache", *self._options, "madison", package])
        return list(dict.fromkeys(line.split("|")[1].strip() for line in listed.splitlines()))

    def version(self, package: str) -> str:
        """The version that would be downloaded."""
        shown = _run(["apt-cache", *self._options, "show", "--no-all-versions", package])
        return next(line.split()[1] for line in shown.splitlines() if line.startswith("Version: "))

    def unpack(self, packages: Sequence[str], target: Path) -> None:
        """Downloads packages, without what they depend on, and unpacks them into `target`."""
        _run(["apt-get", *self._options, "-q", "download", *packages], cwd=self._archive())
        self._unpack_archive(target)

    def unpack_with_dependencies(self, package: str, suite: str | None, target: Path) -> None:
        """The same with every package it needs that this machine has not got."""
        release = ["-t", suite] if suite else []
        install = ["install", "-y", "--download-only", "--no-install-recommends", *release]
        self._archive()
        _run(["apt-get", *self._options, "-q", *install, package])
        self._unpack_archive(target)

    def _archive(self) -> Path:
        archive = self._folder / "cache" / "archives"
        for stale in archive.glob("*.deb"):
            stale.unlink()
        return archive

    def _unpack_archive(self, target: Path) -> None:
        """Unpacks into a folder of its own and renames it: `target` exists whole or not at all."""
        scratch = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        for package in sorted((self._folder / "cache" / "archives").glob("*.deb")):
            _run(["dpkg-deb", "-x", str(package), str(scratch)])
            package.unlink()
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
