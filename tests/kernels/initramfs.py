# SPDX-License-Identifier: Apache-2.0
"""The guest's root file system: parts of this machine's own, as a cpio archive.

So the guest runs the very Python, bcc and project tree that this machine runs, at the same paths.
Format: "newc", Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.apps import tools
from tests.bed.bed import FROZEN_PLUGIN, REFERENCE_PLUGINS
from tests.kernels.images import Kernel
from tests.kernels.suites import FUZZ_PROGRAM, PROJECT
from tests.passes import churn

_LIBRARIES = Path("/usr/lib", sysconfig.get_config_var("MULTIARCH"))
_LINKS = ("bin", "lib", "lib64", "sbin", "var/run")
_CONFIGURATION = ("group", "hosts", "ld.so.cache", "nsswitch.conf", "passwd", "protocols")
_TOOLS = (
    *("cat", "conntrack", "env", "ip", "iptables", "iptables-restore", "ldconfig", "mount"),
    *("sh", "sleep", "ss", "umount"),
    *("haproxy", "java", "nginx", "node", "openssl"),  # tests/kernels/apps.py
)
_MOUNT_POINTS = ("dev", "proc", "run", "sys", "tmp")
# Of the venv, these and what they require.
_DISTRIBUTIONS = ("hypothesis", "pyroute2", "pytest-timeout", "pyyaml", "rich", "tcpip-bypass")
_UNUSED_STANDARD_LIBRARY = frozenset(
    {"ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter"}
)
_UNUSED_JAVA = frozenset({"ct.sym", "src.zip"})
_PROJECT_PARTS = ("bpf", "cni_plugin", "conf", "install", "tests", "pyproject.toml", "docs")


class Closure:
    """Files of this machine that belong together: links with what they lead to, programs and
    libraries with the libraries they load."""

    def __init__(self) -> None:
        self.paths: set[Path] = set()
        self._elf: list[Path] = []

    def add(self, path: Path, unused: frozenset[str] = frozenset()) -> None:
        """A file, a link, or a folder with all that is below it but the names `unused`."""
        path = Path(os.path.realpath(path.parent)) / path.name
        if path in self.paths or not os.path.lexists(path):
            return
        self._add_parents(path)
        self.paths.add(path)
        if path.is_symlink():
            self.add(path.parent / path.readlink())
        elif path.is_dir():
            for entry in sorted(path.iterdir()):
                if entry.name not in unused:
                    self.add(entry, unused)
        elif path.is_file() and _is_elf(path):
            self._elf.append(path)

    def _add_parents(self, path: Path) -> None:
        self.paths.update(parent for parent in path.parents if parent != Path("/"))

    def add_libraries(self) -> None:
        """What the programs and libraries added so far load, as ldd finds it."""
        if not self._elf:
            return
        found = subprocess.run(
            ["ldd", *map(str, self._elf)], capture_output=True, text=True, check=False
        ).stdout
        for word in found.split():
            if word.startswith("/") and not word.endswith(":"):
                self.add(Path(word))


def _is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def guest_files() -> list[Path]:
    """Everything of this machine that the guest gets, folders before what they hold."""
    closure = Closure()
    closure.add(FUZZ_PROGRAM)
    closure.add(churn.PROGRAM)
    # The merged /usr, and /var/run: links to folders of which only parts are wanted.
    closure.paths.add(Path("/var"))
    closure.paths.update(link for name in _LINKS if (link := Path("/", name)).is_symlink())
    for tool in _TOOLS:
        path = shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin")
        if not path:
            raise FileNotFoundError(f"the guests need {tool}, which is not installed")
        closure.add(Path(path))
    closure.add(_LIBRARIES / "xtables")
    for name in _CONFIGURATION:
        closure.add(Path("/etc", name))
    _add_python(closure)
    _add_compiler(closure)
    _add_applications(closure)
    for part in _PROJECT_PARTS:
        closure.add(PROJECT / part, frozenset({"__pycache__"}))
    closure.add_libraries()
    return sorted(closure.paths)


def _add_python(closure: Closure) -> None:
    """The distribution's Python as /usr/bin/python3, and the venv that stands on it."""
    closure.add(Path("/usr/bin/python3"))
    standard_library = Path(sysconfig.get_path("stdlib"))
    static_library = {folder.name for folder in standard_library.glob("config-*")}
    closure.add(standard_library, _UNUSED_STANDARD_LIBRARY | static_library)
    closure.paths.add(PROJECT / ".venv")  # in a work tree of its own perhaps a link to another's
    closure.add(PROJECT / ".venv/bin/python")
    closure.add(PROJECT / ".venv/pyvenv.cfg")
    for distribution in _required(_DISTRIBUTIONS):
        for file in distribution.files or ():
            closure.add(Path(str(distribution.locate_file(file))))


def _required(names: Iterable[str]) -> Iterator[metadata.Distribution]:
    """The named distributions and, transitively, those they require on this machine."""
    queue, seen = list(names), set()
    while queue:
        name = canonicalize_name(queue.pop())
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        yield distribution
        requirements = [Requirement(line) for line in distribution.requires or ()]
        queue += [
            one.name for one in requirements if not one.marker or one.marker.evaluate({"extra": ""})
        ]


def _add_compiler(closure: Closure) -> None:
    """bcc, the libraries that are opened by name, and the headers for the programs."""
    closure.add(Path("/usr/lib/python3/dist-packages/bcc"))
    for pattern in ("libbcc.so.*", "libbpf.so.*", "libgcc_s.so.*", "librt.so.*"):
        for library in _LIBRARIES.glob(pattern):
            closure.add(library)
    headers = Path("/usr/include")
    for folder in ("linux", "asm-generic", f"{_LIBRARIES.name}/asm"):
        closure.add(headers / folder)


def _add_applications(closure: Closure) -> None:
    """What tests/kernels/apps.py runs that no program names: plugins, compiled programs, Java's."""
    for plugin in ("bridge", "host-local"):
        closure.add(REFERENCE_PLUGINS / plugin)
    closure.add(FROZEN_PLUGIN)
    closure.add(tools.go())
    tools.java()
    closure.add(tools.MADE / "java")
    java = Path(os.path.realpath(shutil.which("java") or "")).parents[1]
    for part in ("conf", "lib"):
        closure.add(java / part, _UNUSED_JAVA)
    closure.add(Path("/usr/lib/ssl/openssl.cnf"))


def write(target: Path, kernels: Sequence[Kernel]) -> None:
    """Writes the archive for guests that run `kernels` to `target`."""
    with target.open("wb") as file:
        archive = _Cpio(file)
        for name in _MOUNT_POINTS:
            archive.add(name, stat.S_IFDIR | 0o755, 0, b"")
        for path in guest_files():
            status = path.lstat()
            content = b""
            if stat.S_ISLNK(status.st_mode):
                content = os.fsencode(path.readlink())
            elif stat.S_ISREG(status.st_mode):
                content = path.read_bytes()
            archive.add(str(path)[1:], status.st_mode, int(status.st_mtime), content)
        archive.add("usr/lib/modules", stat.S_IFDIR | 0o755, 0, b"")
        for kernel in kernels:
            folder = f"usr/lib/modules/{kernel.release}"
            archive.add(folder, stat.S_IFDIR | 0o755, 0, b"")
            for module in sorted(kernel.modules.iterdir()):
                archive.add(f"{folder}/{module.name}", stat.S_IFREG, 0, module.read_bytes())
        archive.add("TRAILER!!!", 0, 0, b"")


class _Cpio:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._inode = 0

    def add(self, name: str, mode: int, mtime: int, content: bytes) -> None:
        encoded = os.fsencode(name) + b"\0"
        self._inode += 1
        # inode, mode, uid, gid, links, mtime, size, device (4 numbers), length of name, checksum
        numbers = (self._inode, mode, 0, 0, 1, mtime, len(content), 0, 0, 0, 0, len(encoded), 0)
        self._write(b"070701" + b"".join(b"%08X" % one for one in numbers) + encoded)
        self._write(content)

    def _write(self, content: bytes) -> None:
        self._file.write(content + b"\0" * (-len(content) % 4))
