# SPDX-License-Identifier: Apache-2.0
"""Builds what a Dockerfile says, with debootstrap, overlayfs and chroot instead of an engine.

Knows ARG, FROM debian:N (its digest is passed over), LABEL, RUN, COPY and ENTRYPOINT; anything else
is an error. As in an engine, each instruction makes a layer, named by everything that went into it,
and is not run again as long as that stays the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SUITES = {"debian:12-slim": "bookworm"}
KEYRING = "--keyring=/usr/share/keyrings/debian-archive-keyring.gpg"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LENT = ("PIP_", "http_proxy", "https_proxy", "no_proxy")  # this machine's ways to the network
_IGNORED = shutil.ignore_patterns("__pycache__")  # as .dockerignore has it

# $1 lower folders, $2 upper, $3 work, $4 where to mount, $5 what to run there; all mounts go with
# the mount namespace that this is started in.
_RUN = """
mount -t overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" image "$4"
mount -t proc proc "$4/proc"
mount --rbind /dev "$4/dev"
for lent in /etc/resolv.conf /etc/ssl/certs; do
    [ ! -e "$4$lent" ] || mount --bind "$lent" "$4$lent"
done
exec chroot "$4" sh -c "$5"
"""


class BuildError(Exception):
    """An instruction that cannot be understood, or has failed."""


@dataclass(frozen=True)
class Stage:
    """An image, finished or not: its layers, the newest first, and what it starts."""

    layers: tuple[Path, ...]
    entrypoint: tuple[str, ...] = ()
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def lower(self) -> str:
        """For overlayfs' lowerdir."""
        return ":".join(map(str, self.layers))


@dataclass(frozen=True)
class Builder:
    """Builds from the files below `context`, and keeps the layers in `store`."""

    context: Path
    store: Path

    def build(self, dockerfile: Path, given: Mapping[str, str]) -> Stage:
        """The last stage; `given` are build arguments.

        Raises:
            BuildError: an instruction has failed; the message holds what it printed.
        """
        stages: dict[str, Stage] = {}
        stage, name = Stage(()), ""
        for instruction in resolved(dockerfile.read_text(), given):
            keyword, _, rest = instruction.partition(" ")
            if keyword == "FROM":
                image, _, name = rest.partition(" AS ")
                stage = Stage((self._base(image),))
            elif keyword == "RUN":
                stage = self._run(stage, rest)
            elif keyword == "COPY":
                stage = self._copy(stage, rest.split(), stages)
            elif keyword == "LABEL":
                pairs = [each.partition("=")[::2] for each in shlex.split(rest)]
                stage = replace(stage, labels=(*stage.labels, *pairs))
            elif keyword == "ENTRYPOINT":
                stage = replace(stage, entrypoint=tuple(json.loads(rest)))
            else:
                raise BuildError(f"{dockerfile}: cannot do {instruction!r}")
            stages[name] = stage
        self._remove_all_but({layer for each in stages.values() for layer in each.layers})
        return stage

    def _remove_all_but(self, layers: set[Path]) -> None:
        """What builds before this one have left, also those that were killed."""
        for folder in set(self.store.iterdir()) - layers:
            shutil.rmtree(folder)

    def _base(self, image: str) -> Path:
        """A Debian as debootstrap makes it; kept, for it takes minutes."""
        suite = SUITES.get(image.partition("@")[0])  # of no date: an archive has the newest
        if suite is None:
            raise BuildError(f"there is no making {image}, only {', '.join(SUITES)}")
        folder = self.store / suite
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            _must(["debootstrap", "--variant=minbase", KEYRING, suite, part, *_mirror()])
            part.rename(folder)
        return folder

    def _run(self, stage: Stage, command: str) -> Stage:
        layer = self._layer(stage, command)
        if not layer.exists():
            part, work, mount = (layer.with_suffix(each) for each in (".part", ".work", ".mount"))
            for folder in (part, work, mount):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}
            environment |= {k: v for k, v in os.environ.items() if k.startswith(LENT)}
            arguments: list[str | Path] = [stage.lower, part, work, mount, command]
            unshare = ["unshare", "--mount", "--propagation=private"]
            _must([*unshare, "sh", "-ec", _RUN, "sh", *arguments], environment)
            shutil.rmtree(work)
            mount.rmdir()
            part.rename(layer)
        return replace(stage, layers=(layer, *stage.layers))

    def _copy(self, stage: Stage, words: list[str], stages: dict[str, Stage]) -> Stage:
        """Every source is looked up in the newest layer that has it: a folder made by one RUN."""
        roots: tuple[Path, ...] = (self.context,)
        if words[0].startswith("--from="):
            roots = stages[words.pop(0).removeprefix("--from=")].layers
        *sources, target = words
        found = [_first(roots, source.lstrip("/")) for source in sources]
        layer = self._layer(stage, " ".join(words), *found)
        if not layer.exists():
            part = layer.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            for path in found:
                into = part / target.lstrip("/")
                if path.is_dir():
                    shutil.copytree(path, into, symlinks=True, ignore=_IGNORED)
                else:
                    into.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, into)
            part.rename(layer)
        return replace(stage, layers=(layer, *stage.layers))

    def _layer(self, below: Stage, instruction: str, *contents: Path) -> Path:
        """The folder of the layer that comes of this instruction on top of those below."""
        digest = hashlib.sha256(f"{below.lower}\0{instruction}".encode())
        for content in contents:
            for path in sorted((content, *content.rglob("*"))):
                if path.is_file() and "__pycache__" not in path.parts:
                    digest.update(f"\0{path}\0{path.stat().st_mode}\0".encode())
                    digest.update(path.read_bytes())
        return self.store / digest.hexdigest()[:16]


def instructions(text: str) -> Iterator[str]:
    """A Dockerfile's instructions, each on one line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        yield " ".join(line.split())


def resolved(text: str, given: Mapping[str, str]) -> Iterator[str]:
    """The instructions without ARG, which is filled in where it says `${NAME}`.

    Those above the first FROM hold for every FROM; a stage that wants one names it again.

    Raises:
        BuildError: a given argument is not asked for, or the environment of a RUN would have one.
    """
    outer: dict[str, str] = {}
    known, asked = outer, set()
    for instruction in instructions(text):
        keyword, _, rest = instruction.partition(" ")
        if keyword == "ARG":
            name, _, default = rest.partition("=")
            known[name] = given.get(name, default or outer.get(name, ""))
            asked.add(name)
            continue
        if keyword == "RUN" and known:
            names = ", ".join(known)
            raise BuildError(f"cannot put {names} into the environment of {instruction!r}")
        if keyword == "FROM":
            yield _filled_in(instruction, outer)
            known = {}
        else:
            yield _filled_in(instruction, known) if keyword == "LABEL" else instruction
    if given.keys() - asked:
        raise BuildError(f"no ARG asks for {', '.join(sorted(given.keys() - asked))}")


def _filled_in(instruction: str, values: Mapping[str, str]) -> str:
    """Of a name without a value nothing stays, as in an engine."""
    return re.sub(r"\$\{(\w+)\}", lambda found: values.get(found[1], ""), instruction)


def _first(roots: tuple[Path, ...], path: str) -> Path:
    for root in roots:
        if (root / path).exists():
            return root / path
    raise BuildError(f"COPY: there is no {path}")


def _mirror() -> list[str]:
    """This machine's own Debian mirror; nothing on another distribution: debootstrap knows one."""
    if "\nID=debian\n" not in Path("/etc/os-release").read_text():
        return []
    listing = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    found = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    return [uri for uri in found if uri.rstrip("/").endswith("/debian")][:1]


def _must(argv: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        argv,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        command = shlex.join(map(str, argv))
        raise BuildError(f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}")
