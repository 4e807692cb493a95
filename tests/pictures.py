# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.pictures`: what docs/operating.md shows, recorded anew; as root, five minutes.

A node with a real containerd and two pods, in them real Envoys and a load. The real commands run in
a terminal before and after the agent has installed itself there, and what they print becomes
docs/img/*.svg. A real Prometheus scrapes the agent meanwhile; its answers become dashboard.png.

The node's folders are mounted where every node has them, so that the commands are those of the
documents. There is no API server: `kubectl get` and `kubectl exec` are a script that knows of this
one node, and runs the node program there.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from tests.bed import fetch, istio, mesh
from tests.bed.bed import REDIRECT, REPOSITORY
from tests.bed.cni import Attachment
from tests.bed.netns import NetNamespace
from tests.bed.node import PROGRAM
from tests.bed.pod import APP, MESH, PROXY, PROXY_UID
from tests.bed.pod import Pod as MeshPod
from tests.containerd.agent import Agent
from tests.containerd.bed import PLAIN, Pod, RuntimeBed, open_bare_bed
from tests.manifests import dashboard

PICTURES = REPOSITORY / "docs" / "img"
NODE = "node-1"
CART, REVIEWS = "cart-7d9c6b5f44-x2xlp", "reviews-v1-545db77b95-2l9tk"
SIZE = 16_384  # bytes of an answer
COLUMNS, ROWS = 140, 60
SETTLE_S, WATCHED_S = 40, 12
BEFORE_PAUSE_S, PAUSED_S, AFTER_PAUSE_S = 60, 30, 60
# rich's own loads its font from elsewhere.
SVG = re.sub(
    r"@font-face \{\{.*?\}\}\s*|<!--.*?-->|Fira Code, ", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL
)

# /etc and /opt get a layer that is the node's alone.
PLACES = """
for place in etc opt; do
    own=$1/$place
    mkdir -p "$own/new" "$own/work"
    mount -t overlay -o "lowerdir=/$place,upperdir=$own/new,workdir=$own/work" node "/$place"
done
mkdir -p /etc/cni/net.d /opt/cni/bin
mount --bind "$2" /etc/cni/net.d
mount --bind "$3" /opt/cni/bin
"""
# A kubectl that knows one agent's pod, and one of an application.
KUBECTL = """#!{python}
import json, os, sys
words = sys.argv[1:]
if "exec" in words:
    argv = {entering} + words[words.index("--") + 2:]
    os.execvp(argv[0], argv)
print(json.dumps({pods} if "pods" in words else {pod}))
"""
# Requests on connections that stay, with a pause after each; and some on new ones.
CLIENT = """
import http.client, itertools, sys, threading, time
def ask(at_most, pause_s):
    while True:
        connection = http.client.HTTPConnection(sys.argv[1], timeout=60)
        for _ in itertools.islice(itertools.count(), at_most):
            connection.request("GET", "/body")
            connection.getresponse().read()
            time.sleep(pause_s)
        connection.close()
for at_most, pause_s in 6 * [(None, 0.004)] + [(20, 0.02)]:
    threading.Thread(target=ask, args=(at_most, pause_s)).start()
"""
# Two ends in one pod of which one reads with blocking calls.
BLOCKING = """
import socket, time
with socket.create_server(("127.0.0.1", 0)) as listener:
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    client.setblocking(False)
    while True:
        for one, other in ((client, server), (server, client)):
            one.send(b"x" * 100)
            time.sleep(0.005)
            other.recv(100)
"""


@dataclass(frozen=True)
class SandboxNamespace(NetNamespace):
    """A network namespace that a runtime has made, found by a process in it."""

    pid: int = 0

    @property
    def path(self) -> Path:
        return Path(f"/proc/{self.pid}/ns/net")


def main() -> int:
    """Returns the exit status."""
    if os.geteuid() != 0:
        print("It makes network namespaces and loads BPF programs: run it as root.")
        return 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    with open_bare_bed() as bare:
        agent = Agent(bare, environment={"NODE_NAME": NODE})
        put_in_place(bare, agent)
        bed = bare.as_it_is()
        try:
            with shop(bed) as (cart, reviews):
                before_installation(bed, cart, reviews)
                agent.start_and_wait()
                after_installation(bed, agent, cart, reviews)
        finally:
            agent.kill()
            bed.end_all_sandboxes()
            agent.run("uninstall", "--purge", *agent.places())
        left = {kind: found for kind, found in bed.leftovers().items() if found}
    print(f"left behind: {left}" if left else "nothing is left behind")
    return 1 if left else 0


def put_in_place(bed: RuntimeBed, agent: Agent) -> None:
    """The node's network configurations and plugins, where a node has them."""
    arguments = [bed.node.folder, agent.conf_dir, agent.bin_dir]
    bed.node.run(["sh", "-ec", PLACES, "sh", *arguments])


@contextmanager
def shop(bed: RuntimeBed) -> Iterator[tuple[MeshPod, MeshPod]]:
    """A client's and a server's pod, with Istio's rules and without processes."""
    with ExitStack() as stack:
        made = []
        for name in (CART, REVIEWS):
            pod = stack.enter_context(bed.pod(name, handler=PLAIN))
            pod.identity = replace(pod.identity, namespace="shop")
            sandbox = pod.run_sandbox()
            stack.callback(pod.end_sandbox, sandbox)
            made.append(stack.enter_context(in_mesh(bed, pod, sandbox)))
        yield made[0], made[1]


@contextmanager
def in_mesh(bed: RuntimeBed, pod: Pod, sandbox: str) -> Iterator[MeshPod]:
    """The same pod, as the parts of tests.bed know one; its processes end on leaving."""
    status = bed.cri.sandbox_status(sandbox)
    name, uid = pod.identity.name, pod.identity.uid
    namespace = SandboxNamespace(name, status.pid)
    istio.intercept(namespace, PROXY_UID, REDIRECT)
    folder = bed.node.folder / "mesh" / name
    folder.mkdir(parents=True)
    for container in (APP, PROXY):
        (pod.cgroup / container).mkdir()
    path = pod.identity.cgroup_parent
    known = Attachment(sandbox, namespace, "shop", name, uid, path, dict(MESH))
    made = MeshPod(name, known, namespace, pod.cgroup, (status.ip,), folder, REDIRECT)
    try:
        yield made
    finally:
        made.kill()


@contextmanager
def load(cart: MeshPod, reviews: MeshPod) -> Iterator[None]:
    """Requests through two sidecars, and a pair of ends inside one pod, for as long as wanted."""
    with mesh.running(cart, reviews, {"body": fetch.pattern(SIZE)}):
        host = mesh.SERVICE_URL.removeprefix("http://")
        running = [
            cart.spawn([sys.executable, "-c", CLIENT, host]),
            reviews.spawn([sys.executable, "-c", BLOCKING]),
        ]
        try:
            yield
            if any(each.poll() is not None for each in running):
                raise RuntimeError(f"the load has ended:\n{cart.logs()}{reviews.logs()}")
        finally:
            for each in running:
                each.kill()
                each.wait()


def before_installation(bed: RuntimeBed, cart: MeshPod, reviews: MeshPod) -> None:
    with load(cart, reviews):
        time.sleep(2)
        command = "tcpip-bypass-node estimate --seconds 20"
        picture("estimate", [shown(bed, command)])


def after_installation(bed: RuntimeBed, agent: Agent, cart: MeshPod, reviews: MeshPod) -> None:
    target = f"127.0.0.1:{agent.port}"
    folder = bed.node.folder / "prometheus"
    with (
        dashboard.prometheus(bed.node.entering, bed.node.host, folder, target) as prometheus,
        load(cart, reviews),
    ):
        began = time.time()
        time.sleep(SETTLE_S)
        watch = shown(bed, "tcpip-bypass-node status --watch 5", seconds=WATCHED_S)
        with kubectl(bed, agent) as environment:
            plugin = [
                said(command, ["bash", "-c", command], environment)
                for command in (
                    "kubectl tcpip-bypass status",
                    f"kubectl tcpip-bypass explain -n shop {REVIEWS}",
                )
            ]
        picture("check", [shown(bed, "tcpip-bypass-node check")])
        picture("status", [watch, *plugin])
        time.sleep(max(0.0, began + BEFORE_PAUSE_S + SETTLE_S - time.time()))
        agent.run("pause")
        time.sleep(PAUSED_S)
        agent.run("resume")
        time.sleep(AFTER_PAUSE_S)
        dashboard.draw(prometheus, began, time.time(), PICTURES / "dashboard.png")


@contextmanager
def kubectl(bed: RuntimeBed, agent: Agent) -> Iterator[Mapping[str, str]]:
    """An environment with the real kubectl, our plugin for it, and the script that it asks."""
    folder = bed.node.folder / "kubectl"
    folder.mkdir()
    container = {"name": "agent", "args": ["agent", f"--listen=:{agent.port}"]}
    metadata = {"name": "tcpip-bypass-node-x7k2p", "namespace": "kube-system"}
    ready = {"conditions": [{"type": "Ready", "status": str(agent.reasons() == [])}]}
    spec = {"nodeName": NODE, "containers": [container]}
    pods = {"items": [{"metadata": metadata, "spec": spec, "status": ready}]}
    pod = {"metadata": {"name": REVIEWS, "namespace": "shop"}, "spec": {"nodeName": NODE}}
    script = KUBECTL.format(
        python=sys.executable,
        entering=[str(each) for each in on_node(bed, [PROGRAM])],
        pods=pods,
        pod=pod,
    )
    plugin = folder / "kubectl-tcpip_bypass"
    plugin.write_text(
        f'#!/bin/sh\nPATH="{folder}/asked:$PATH" '
        f'exec {sys.executable} {REPOSITORY}/install/kubectl-tcpip_bypass "$@"\n'
    )
    (folder / "asked").mkdir()
    (folder / "asked" / "kubectl").write_text(script)
    for each in (plugin, folder / "asked" / "kubectl"):
        each.chmod(0o755)
    yield {"PATH": f"{folder}:{PROGRAM.parent}:{os.environ['PATH']}"}


def on_node(bed: RuntimeBed, argv: Sequence[str | Path]) -> list[str | Path]:
    """The command line that runs argv there, as the DaemonSet's pod would."""
    return bed.node.entering(["env", f"NODE_NAME={NODE}", *argv])


def shown(bed: RuntimeBed, command: str, seconds: float | None = None) -> Text:
    """A command of the node program, and what it printed on the node."""
    _, *options = command.split()
    return said(command, on_node(bed, [PROGRAM, *options]), {}, seconds)


def said(
    command: str,
    argv: Sequence[str | Path],
    environment: Mapping[str, str],
    seconds: float | None = None,
) -> Text:
    """What is on a terminal after a command, which Ctrl-C ends after so many seconds."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    with subprocess.Popen(
        argv,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", **environment},
    ) as process:
        os.close(theirs)
        printed = b""
        deadline = None if seconds is None else time.monotonic() + seconds
        while chunk := _read(ours):
            printed += chunk
            if deadline and time.monotonic() > deadline:
                process.send_signal(signal.SIGINT)
                deadline = None
    os.close(ours)
    # A live table erases line after line before it is written anew: the last one counts.
    text = printed.decode().replace("\r\n", "\n").rpartition("\x1b[2K")[2]
    printed_text = Text.from_ansi(text)
    printed_text.rstrip()
    prompt = Text.assemble(("$ ", "green"), (command, "bold"))
    lines = [prompt, *printed_text.split("\n")]
    return Text("\n").join(part for line in lines for part in _folded(line)) + Text("\n")


def _folded(line: Text) -> list[Text]:
    """A line as a terminal breaks it."""
    return list(line.divide(range(COLUMNS, len(line), COLUMNS)))


def _read(terminal: int) -> bytes:
    """Some of what comes; nothing once every process has closed the other end."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""


def picture(name: str, parts: Sequence[Text]) -> None:
    """The texts as a terminal shows them one after the other, in docs/img/NAME.svg."""
    text = Text("\n").join(parts)
    text.rstrip()
    widest = max(len(line.rstrip()) for line in text.plain.splitlines())
    console = Console(record=True, width=widest + 1, file=io.StringIO(), force_terminal=True)
    console.print(text, highlight=False, no_wrap=True)
    path = PICTURES / f"{name}.svg"
    path.write_text(
        console.export_svg(title=NODE, theme=MONOKAI, code_format=SVG, unique_id=name) + "\n"
    )
    print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size} bytes\n{text.plain}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
