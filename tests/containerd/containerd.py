# SPDX-License-Identifier: Apache-2.0
"""containerd on a node: configured, started, killed, started again.

Debian's and Ubuntu's own packages, or newer ones beside them (releases.py). Inside the node's mount
namespace it has the paths that every node has (/run/containerd, /run/netns, /var/lib/cni); only its
root is elsewhere, because overlayfs cannot lie on the node's /var/lib, which is one.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bed.cni import Json
from tests.containerd import cri, image
from tests.containerd.cri import Cri, CriError
from tests.containerd.node import Node
from tests.containerd.releases import Release

START_TIMEOUT_S = 30
METRICS_PORT = 1338
NETWORK = "pods"  # the name in every conflist
SECOND = "second"  # of a pod's second interface
SOCKET = Path("/run/containerd/containerd.sock")

Chains = Mapping[str, Sequence[Json]]  # by runtime handler

# restrict_oom_score_adj: sandboxes ask for -998, which takes CAP_SYS_RESOURCE.
CONFIG = """\
version = 2
root = "{folder}/containerd"
state = "/run/containerd"

[grpc]
address = "{socket}"

[metrics]
address = "127.0.0.1:{metrics_port}"

[plugins."io.containerd.internal.v1.opt"]
path = "{folder}/containerd/opt"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
restrict_oom_score_adj = true

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{bin_dir}"
conf_dir = "{conf_dir}"

[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "{default}"
"""
HANDLER = """
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{name}]
runtime_type = "io.containerd.runc.v2"
cni_conf_dir = "{conf_dir}"
cni_max_conf_num = {networks}
"""


@dataclass(frozen=True)
class CniCalls:
    """How often a runtime has called a pod's CNI chain; errors are among the others."""

    adds: int = 0
    dels: int = 0
    errors: int = 0

    def __add__(self, other: CniCalls) -> CniCalls:
        return CniCalls(self.adds + other.adds, self.dels + other.dels, self.errors + other.errors)

    def __sub__(self, earlier: CniCalls) -> CniCalls:
        return CniCalls(
            self.adds - earlier.adds, self.dels - earlier.dels, self.errors - earlier.errors
        )


class Containerd:
    """A runtime with one CNI chain per runtime handler, the first one being the default."""

    def __init__(
        self, node: Node, cri: Cri, chains: Chains, release: Release, second: Chains
    ) -> None:
        self.cri = cri
        self.release = release
        self._node = node
        self._process: subprocess.Popen[bytes] | None = None
        self._log = node.folder / "containerd.log"
        self._config = node.folder / "config.toml"
        self.bin_dir = node.folder / "bin"
        self._configure(chains, second)

    def start(self) -> None:
        """Start it and wait until it takes calls.

        Raises:
            RuntimeError: it ended, or is not ready after START_TIMEOUT_S; with its log.
        """
        programs = self.release.programs
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._node.entering([programs / "containerd", "--config", self._config]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Plugins inherit it; a service has little else. The shim is looked for in it.
                env={"PATH": f"{programs}:{os.environ['PATH']}"},
                start_new_session=True,
            )
        self._wait_until("takes calls", self._is_ready)

    def kill(self) -> None:
        """End it as the kernel ends what it must: no clean-up, no notice; shims live on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def import_pause_image(self) -> None:
        """Give it the sandboxes' image."""
        archive = self._node.folder / "pause.tar"
        image.write(archive)
        self._ctr("images", "import", archive)
        self._wait_until("knows its image", self._has_image)

    def cni_calls(self) -> CniCalls:
        """What its own metrics say about its CNI calls since it was started."""
        with self._node.host.entered():  # where its metrics are served
            connection = http.client.HTTPConnection("127.0.0.1", METRICS_PORT, timeout=10)
            connection.connect()
        with closing(connection):
            connection.request("GET", "/v1/metrics")
            text = connection.getresponse().read().decode()
        return CniCalls(
            adds=_metric(text, "operations", "set_up_pod"),
            dels=_metric(text, "operations", "tear_down_pod"),
            errors=_metric(text, "operations_errors", "set_up_pod")
            + _metric(text, "operations_errors", "tear_down_pod"),
        )

    def log(self) -> str:
        """Everything it has said, with what CNI plugins wrote to stderr."""
        return self._log.read_text(errors="replace")

    def _configure(self, chains: Chains, second: Chains) -> None:
        text = ""
        for name, plugins in chains.items():
            conf_dir = self._node.folder / "net.d" / name
            conf_dir.mkdir(parents=True)
            self._write_conflist(conf_dir / "10-pods.conflist", NETWORK, plugins)
            if name in second:
                self._write_conflist(conf_dir / "20-second.conflist", SECOND, second[name])
            if not text:
                text = CONFIG.format(
                    folder=self._node.folder,
                    socket=SOCKET,
                    metrics_port=METRICS_PORT,
                    image=image.NAME,
                    bin_dir=self.bin_dir,
                    conf_dir=conf_dir,
                    default=name,
                )
            networks = 1 + (name in second)
            text += HANDLER.format(name=name, conf_dir=conf_dir, networks=networks)
        self._config.write_text(text)

    def _write_conflist(self, path: Path, name: str, plugins: Sequence[Json]) -> None:
        conflist = {"cniVersion": self.release.cni_version, "name": name, "plugins": plugins}
        path.write_text(json.dumps(conflist, indent=2))

    def _is_ready(self) -> bool:
        try:
            return self.cri.is_ready()
        except CriError:
            return False

    def _has_image(self) -> bool:
        # The CRI plugin hears of an import a moment later; then it adds a name by digest.
        return "sha256:" in self._ctr("images", "ls", "--quiet")

    def _ctr(self, *arguments: str | Path) -> str:
        return self._node.run([self.release.programs / "ctr", "--namespace", "k8s.io", *arguments])

    def _wait_until(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            ended = self._process is None or self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                raise RuntimeError(f"waited in vain until containerd {what}:\n{self.log()}")
            time.sleep(0.05)


def _metric(text: str, name: str, operation: str) -> int:
    """A counter of the CRI plugin's CNI calls, which is not there until the first call."""
    label = re.escape(f'{{operation_type="{operation}"}}')
    found = re.search(rf"^containerd_cri_network_plugin_{name}(?:_total)+{label} (\S+)", text, re.M)
    return int(float(found[1])) if found else 0


@contextmanager
def running(
    node: Node, chains: Chains, release: Release, second: Chains | None = None
) -> Iterator[Containerd]:
    """A containerd that has its image; killed on leaving. Some handlers have a second network."""
    with cri.connected(node.outside(SOCKET)) as client:
        containerd = Containerd(node, client, chains, release, second or {})
        try:
            containerd.start()
            containerd.import_pause_image()
            yield containerd
        finally:
            containerd.kill()
