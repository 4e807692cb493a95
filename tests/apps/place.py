# SPDX-License-Identifier: Apache-2.0
"""Where an application runs: two ends of a hop, their pods and addresses.

On the hops `outbound` and `inbound` a real server or client stands in for the sidecar, as its
user. A proxy has a second link, to its backend: the hop that its connection takes in a mesh.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cni_plugin import names
from tests.apps import sockets
from tests.bed import OPTED_OUT, Bed, Pod, addresses, istio
from tests.bed.pairs import Kind, Pair
from tests.bed.pingpong import APP_PORT, SERVICE_IP, SERVICE_PORT
from tests.bed.pod import APP, PROXY

HopName = Literal["outbound", "inbound", "direct", "mesh"]
HOPS: tuple[HopName, ...] = ("outbound", "inbound", "direct", "mesh")
TWO_HOPS: tuple[HopName, ...] = ("inbound", "mesh")  # for those that others stand for on the rest
READY_TIMEOUT_S = 240  # for Java on an emulated CPU; a server that has ended is noticed at once
BACKEND_PORT = 8081


@dataclass(frozen=True)
class End:
    """A container that programs of an application run in."""

    pod: Pod
    container: str
    cpus: str = "-"

    def spawn(
        self, argv: Sequence[str | Path], *, stdin: int | None = subprocess.DEVNULL
    ) -> subprocess.Popen[str]:
        """Start a program; its output goes to the pod's logs."""
        return self.pod.spawn(argv, container=self.container, cpus=self.cpus, stdin=stdin)

    def run(self, argv: Sequence[str | Path], *, timeout_s: float = 60) -> str:
        """Run a program to its end and return what it printed; raises as Pod.run."""
        return self.pod.run(argv, container=self.container, cpus=self.cpus, timeout_s=timeout_s)

    def folder(self, name: str) -> Path:
        """A folder that the container's user may write to."""
        made = self.pod.folder / f"{self.container}-{name}"
        made.mkdir(exist_ok=True)
        self.give(made)
        return made

    def give(self, path: Path) -> None:
        """Make a path the container's user's own."""
        os.chown(path, *self.pod.user_of(self.container))


@dataclass(frozen=True)
class Link:
    """One hop: the client, where it connects to, and the server that listens there."""

    client: End
    destination: str
    port: int
    server: End
    listen_port: int

    @property
    def address(self) -> str:
        return f"{self.destination}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @contextmanager
    def serving(
        self, argv: Sequence[str | Path], *, stop: Callable[[], None] | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        """A server that runs and listens; killed with its children on leaving.

        stop: called before, for servers whose children have sessions of their own.

        Raises:
            RuntimeError: it ended, or does not listen; the message holds its log.
        """
        process = self.server.spawn(argv)
        try:
            self.await_listening(process)
            yield process
        finally:
            if stop is not None:
                stop()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._await_silence()

    def _await_silence(self) -> None:
        """Return once nothing listens on the link's port: the next server is to."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while sockets.listens(self.server.pod.netns, self.listen_port):
            if time.monotonic() > deadline:
                raise RuntimeError(f"port {self.listen_port} of {self.server.pod.name} stays taken")
            time.sleep(0.02)

    def await_listening(self, process: subprocess.Popen[str]) -> None:
        """Return once a socket listens on the link's port; raises as serving()."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while not sockets.listens(self.server.pod.netns, self.listen_port):
            if process.poll() is not None or time.monotonic() > deadline:
                said = "does not listen" if process.poll() is None else "ended"
                arguments = " ".join(map(str, process.args[7:]))  # type: ignore[index]
                raise RuntimeError(f"{arguments} {said}:\n{self.server.pod.logs()}")
            time.sleep(0.02)


@dataclass(frozen=True)
class Place:
    """A hop of one pair of pods. back: the proxy's link to its backend."""

    hop: HopName
    pair: Pair
    front: Link
    back: Link


@dataclass(frozen=True)
class Pods:
    """A kind's pods: a pair with sidecars, and one without."""

    kind: Kind
    mesh: Pair
    plain: Pair


@contextmanager
def pods(bed: Bed, kind: Kind, prefix: str) -> Iterator[Pods]:
    """The pods of one kind, accelerated or not; prefix: of their names."""
    annotations = OPTED_OUT if kind == "plain" else {names.ENABLED: "true"}
    with ExitStack() as stack:

        def pair(name: str, interception: istio.Interception | None) -> Pair:
            client, server = (
                stack.enter_context(
                    bed.pod(
                        f"{prefix}-{kind}-{name}-{role}",
                        interception=interception,
                        annotations=annotations,
                    )
                )
                for role in ("client", "server")
            )
            return Pair(kind, client, server)

        mesh = pair("mesh", istio.Interception())
        _from_envoys_address(mesh.server)
        yield Pods(kind, mesh, pair("direct", None))


def _from_envoys_address(pod: Pod) -> None:
    """Connections of the pod to itself come from 127.0.0.6: real clients can't bind to it."""
    route = ["local", pod.ip, "dev", "eth0", "table", "local", "proto", "kernel", "scope", "host"]
    with pod.netns.entered():
        subprocess.run(
            ["ip", "route", "replace", *route, "src", addresses.OF["v4"].envoy], check=True
        )


def place(pods: Pods, hop: HopName, cpus: str = "-") -> Place:
    """Where an application runs on a hop."""
    pair = pods.plain if hop == "direct" else pods.mesh
    client, server = End(pair.client, APP, cpus), End(pair.server, APP, cpus)
    client_proxy, server_proxy = End(pair.client, PROXY, cpus), End(pair.server, PROXY, cpus)
    service, client_ip, server_ip = SERVICE_IP, pair.client.ip, pair.server.ip
    outbound, inbound = istio.OUTBOUND_PORT, istio.INBOUND_PORT
    links = {
        "outbound": (
            Link(client, service, SERVICE_PORT, client_proxy, outbound),
            Link(client_proxy, server_ip, APP_PORT, server_proxy, inbound),
        ),
        "inbound": (
            Link(server_proxy, server_ip, APP_PORT, server, APP_PORT),
            Link(server, service, SERVICE_PORT, server_proxy, outbound),
        ),
        "direct": (
            Link(client, server_ip, APP_PORT, server, APP_PORT),
            Link(server, client_ip, BACKEND_PORT, client, BACKEND_PORT),
        ),
        # Back through both sidecars, to an application beside the client.
        "mesh": (
            Link(client, service, SERVICE_PORT, server, APP_PORT),
            Link(server, service, SERVICE_PORT, client, APP_PORT),
        ),
    }
    return Place(hop, pair, *links[hop])
