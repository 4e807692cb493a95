# SPDX-License-Identifier: Apache-2.0
"""`bugreport`: one archive with what is needed to find a fault of ours on a node.

No payload of any connection is in it, and nothing secret: configurations lose whatever may be a
credential. Its first file lists what is in it. A part that cannot be had says why, in its place.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cni_plugin import names
from install.program import ROOT, VERSION, freshness, host, report, selftest
from install.program.agent.command import sockets_of
from install.program.check import command as check
from install.program.check.node import Asked
from install.program.node import Node, NodeError

if TYPE_CHECKING:
    from install.program.installer import Places

CONTENTS = "CONTENTS.txt"
LOG_LINES = 2000
JOURNAL_S = 30.0
SYSCTLS = (
    *("kernel/bpf_stats_enabled", "kernel/unprivileged_bpf_disabled", "kernel/osrelease"),
    *("net/core/bpf_jit_enable", "net/core/bpf_jit_harden", "net/core/rmem_max"),
    *("net/core/wmem_max", "net/core/netdev_max_backlog", "net/core/somaxconn"),
    *("net/ipv4/tcp_mem", "net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem"),
    *("net/ipv4/tcp_congestion_control", "net/ipv4/tcp_shrink_window"),
    *("net/ipv4/tcp_moderate_rcvbuf", "net/ipv4/tcp_adv_win_scale"),
    *("net/ipv4/tcp_keepalive_time", "net/mptcp/enabled"),
    *("net/netfilter/nf_conntrack_tcp_timeout_established",),
    *("net/netfilter/nf_conntrack_tcp_timeout_close_wait",),
    *("net/netfilter/nf_conntrack_max", "net/netfilter/nf_conntrack_count"),
)

_REMOVED = "(removed)"
_SECRET_KEY = re.compile(r"token|secret|passw|credential|auth|private|cert|key", re.IGNORECASE)
_SECRET_TEXTS = (
    re.compile(r"(?<=://)[^/@\s\"]+(?=@)"),  # user and password in a URL
    re.compile(r"(?<=Bearer )\S+", re.IGNORECASE),
    re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]*"),  # a JSON web token
    re.compile(r"-----BEGIN [^-]*-----.*?(-----END [^-]*-----|\Z)", re.DOTALL),
)


@dataclass(frozen=True)
class Part:
    """One file of the archive."""

    name: str
    about: str
    make: Callable[[], str]

    def text(self) -> str:
        """Its content, without secrets, or why there is none."""
        try:
            return without_secrets(self.make())
        except Exception as error:  # whatever is broken here is what the report is for
            return f"could not be had: {type(error).__name__}: {error}\n"


def options(parser: argparse.ArgumentParser) -> None:
    """Adds those that only `bugreport` has."""
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where to write it, `-` for stdout; default: tcpip-bypass-NODE-TIME.tar.gz here",
    )
    parser.add_argument(
        "--pod",
        action="append",
        default=[],
        metavar="NAMESPACE/NAME",
        help="also the states of this pod's sockets; may be given several times",
    )


def run(node: Node, places: Places, arguments: argparse.Namespace) -> int:
    """Writes the archive; returns the exit status. Raises OSError, NodeError."""
    asked = Asked(node, places, sockets_of(arguments), check.host_root(places.host_proc))
    parts = [*_parts(asked), *_pod_parts(asked, arguments.pod)]
    if arguments.output == "-":
        if sys.stdout.isatty():
            raise NodeError("an archive is not for a terminal; name a file with --output")
        write(parts, sys.stdout.buffer)
        return 0
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = Path(arguments.output or f"tcpip-bypass-{report.node_name()}-{stamp}.tar.gz")
    path.touch(mode=0o600, exist_ok=False)
    with path.open("wb") as file:
        write(parts, file)
    print(f"{path}: {CONTENTS} in it says what it holds; look at it before you send it")
    return 0


def write(parts: list[Part], file: BinaryIO) -> None:
    """A gzipped tar, the list of contents first. Raises OSError."""
    texts = [(part.name, part.about, part.text().encode("utf-8", "replace")) for part in parts]
    listing = "".join(f"{name:28} {len(text):9}  {about}\n" for name, about, text in texts)
    now = time.strftime("%F %TZ", time.gmtime())
    head = (
        f"tcpip-bypass {VERSION} on {report.node_name()}, {now}\n"
        "Names and addresses of pods and connections are in here. No byte that a connection\n"
        "carried is, and no annotation; what may be a credential was removed.\n\n"
    )
    with tarfile.open(fileobj=file, mode="w|gz") as archive:
        for name, text in [(CONTENTS, (head + listing).encode()), *((n, t) for n, _, t in texts)]:
            entry = tarfile.TarInfo(f"tcpip-bypass/{name}")
            entry.size, entry.mtime, entry.mode = len(text), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(text))


def _selftest(node: Node) -> str:
    return _json(selftest.run(mends=node.mends_fionread).as_json())


def _parts(asked: Asked) -> Iterator[Part]:
    node = asked.node
    yield Part("versions.json", "what runs here", lambda: _json(_versions(asked)))
    yield Part("check.json", "what `check` says, with every pod", lambda: _check(asked))
    yield Part(
        "status.json", "what `status` says, with counters", lambda: _json(report.report(node))
    )
    yield Part("selftest.json", "the kernel, tried now", lambda: _selftest(node))
    yield Part(
        "node.json", "what the last load has found", _reader(node.state_dir / names.NODE_JSON)
    )
    yield Part("generations.json", "what is pinned", lambda: _json(_generations(node)))
    yield Part("sysctls.txt", "of the node", lambda: _sysctls(asked.host_root))
    yield Part("agent.log", "the end of the agent's log", lambda: _log(node, names.AGENT_LOGS))
    yield Part("joiner.log", "the joiner's", lambda: _log(node, names.JOINER_LOGS))
    proc = asked.places.host_proc
    about = "what the runtime's log says of the plugin"
    yield Part("runtime.log", about, lambda: _journal(proc))
    folders = (names.ATTACHMENTS, names.FAILURES)
    for path in sorted(each for name in folders for each in (node.state_dir / name).glob("*")):
        about = "what ADD has recorded for a pod, or noted"
        yield Part(f"state/{path.parent.name}/{path.name}", about, _reader(path))
    for path in sorted(_configurations(asked.places.conf_dir)):
        about = "a network configuration, credentials removed"
        yield Part(f"net.d/{path.name}", about, _configuration(path))


def _reader(path: Path) -> Callable[[], str]:
    return lambda: path.read_text(errors="replace")


def _json(document: object) -> str:
    return json.dumps(document, indent=1, default=str) + "\n"


def _check(asked: Asked) -> str:
    findings, pods = check.look(asked, before_install=False)
    return _json(check.as_json(findings, pods))


def _versions(asked: Asked) -> dict[str, Any]:
    return {
        "version": VERSION,
        "programs": freshness.version(),
        "reason_to_load": freshness.reason_to_load(asked.node),
        "node": report.node_name(),
        "kernel": platform.release(),
        "kernel_build": platform.version(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "runtime": _runtime(asked.socket),
        "os": _os_release(asked.host_root),
    }


def _os_release(root: Path) -> str:
    """The node's, which is not that of the image; os-release(5) names the two places."""
    for name in ("etc/os-release", "usr/lib/os-release"):
        path = root / name
        is_absolute = path.is_symlink() and path.readlink().is_absolute()
        target = root / path.readlink().relative_to("/") if is_absolute else path
        if target.is_file():
            return target.read_text(errors="replace")
    return ""


def _runtime(socket: Path | None) -> str:
    """Name and version, as the runtime tells them, or why it does not."""
    if socket is None:
        return "no container runtime's socket is there"
    from install.program.agent.cri import CriError, Runtime, connected  # noqa: PLC0415 - see there

    try:
        with connected(socket) as channel:
            return Runtime(channel).version()
    except CriError as error:
        return f"{socket}: {error}"


def _generations(node: Node) -> list[dict[str, Any]]:
    complete = node.generations.complete()
    return [
        {
            "name": each.folder.name,
            "pins": sorted(pin.name for pin in each.folder.iterdir()),
            "complete": each in complete,
            "flags": each.flags() if each in complete else None,
            "has_sockets": each.has_sockets() if each in complete else None,
        }
        for each in node.generations.all()
    ]


def _sysctls(root: Path) -> str:
    """In a pod: the node's, since the pod is in its network; what is missing is left out."""
    lines = []
    for name in SYSCTLS:
        path = root / "proc/sys" / name
        path = path if path.exists() else Path("/proc/sys") / name
        if path.exists():
            lines.append(f"{name.replace('/', '.')} = {path.read_text().strip()}\n")
    return "".join(lines)


def _log(node: Node, files: tuple[str, str]) -> str:
    lines = [
        line
        for name in files
        if (node.state_dir / name).exists()
        for line in (node.state_dir / name).read_text(errors="replace").splitlines()
    ]
    return "\n".join(lines[-LOG_LINES:]) + "\n" if lines else "none has run here\n"


_NO_JOURNAL = "the node has no journalctl; look where its runtime writes its log\n"


def _journal(proc: Path) -> str:
    """By the node's journalctl, of the node's journal: the pod has neither."""
    units = [f"--unit={each}" for each in ("containerd", "crio", "k3s", "k3s-agent", "kubelet")]
    argv = ["journalctl", "--quiet", "--no-pager", "--lines=500", "--grep=tcpip-bypass", *units]
    if proc != host.OWN_PROC:
        argv = [sys.executable, "-m", host.__name__, str(proc), *argv]
    try:
        done = subprocess.run(
            argv,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=JOURNAL_S,
            check=False,
        )
    except FileNotFoundError:
        return _NO_JOURNAL
    except subprocess.TimeoutExpired as error:
        return f"the node's journal takes too long: {error}\n"
    if done.returncode == host.CANNOT_ENTER:
        return f"the node could not be entered: {done.stderr}"
    if done.returncode == host.NOT_THERE:
        return _NO_JOURNAL
    return done.stdout or done.stderr or "nothing\n"


def _configurations(folder: Path) -> list[Path]:
    return [each for each in folder.glob("*") if each.is_file()] if folder.is_dir() else []


def _configuration(path: Path) -> Callable[[], str]:
    """Only what parses is shown: what does not could hide a credential from the search for it."""

    def make() -> str:
        text = path.read_text(errors="replace")
        try:
            return _json(without_credentials(json.loads(text)))
        except ValueError as error:
            return f"{len(text)} characters that are no JSON: {error}\n"

    return make


def without_credentials(document: Any) -> Any:
    """The document, with the values of keys that sound like credentials taken out."""
    if isinstance(document, dict):
        return {
            key: _REMOVED if _SECRET_KEY.search(key) else without_credentials(value)
            for key, value in document.items()
        }
    if isinstance(document, list):
        return [without_credentials(each) for each in document]
    return document


def without_secrets(text: str) -> str:
    """The text, without what looks like a credential wherever it stands."""
    for pattern in _SECRET_TEXTS:
        text = pattern.sub(_REMOVED, text)
    return text


def _pod_parts(asked: Asked, pods: list[str]) -> Iterator[Part]:
    for pod in pods:
        file = pod.replace("/", "_")
        yield Part(f"sockets/{file}.json", f"the states of {pod}'s sockets", _sockets(asked, pod))


def _sockets(asked: Asked, pod: str) -> Callable[[], str]:
    def make() -> str:
        from install.program.estimate import files, sockets  # noqa: PLC0415 - pyroute2: 130 ms

        namespaces = _namespaces(asked, pod)
        if not namespaces:
            raise NodeError(f"no pod {pod} on this node")
        found = {each: sockets.dump(each) for each in namespaces}
        inodes = {socket.inode for dump in found.values() for socket in dump.sockets}
        blocking = files.blocking(asked.places.host_proc, list(found), inodes - {0})
        return _json(
            {
                namespace: {
                    "buffers": asdict(dump.buffers),
                    "sockets": [
                        {**asdict(each), "blocking": blocking.get(each.inode)}
                        for each in dump.sockets
                    ],
                }
                for namespace, dump in found.items()
            }
        )

    return make


def _namespaces(asked: Asked, pod: str) -> list[str]:
    """By our records; for a pod without, by the runtime."""
    recorded = [
        each.netns
        for each in asked.node.attachments()
        if f"{each.pod_namespace}/{each.pod_name}" == pod
    ]
    if recorded or asked.socket is None:
        return recorded
    from cni_plugin import netconf  # noqa: PLC0415 - for pods without a record only
    from install.program.estimate.pods import of_runtime  # noqa: PLC0415

    pods = of_runtime(asked.socket, netconf.parse({}))
    return [each.netns for each in pods if each.title == pod]
