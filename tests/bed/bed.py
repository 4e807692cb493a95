# SPDX-License-Identifier: Apache-2.0
"""The node: its namespace, folders and chain, and the pods on it."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bed import cgroups, cni, congestion, netns, pod, sweep
from tests.bed.cni import Chain, Json
from tests.bed.istio import Interception
from tests.bed.netns import NetNamespace
from tests.bed.node import NodeProgram
from tests.bed.pod import Pod

REPOSITORY = Path(__file__).parents[2]
REFERENCE_PLUGINS = Path("/usr/lib/cni")  # Debian's and Ubuntu's containernetworking-plugins
FROZEN_PLUGIN = REPOSITORY / "dist" / "tcpip-bypass"

REDIRECT = Interception()

_numbers = itertools.count()
_live: set[str] = set()


@dataclass(frozen=True)
class Bed:
    """A node of one run; `pod()` makes pods on it."""

    name: str
    folder: Path
    host: NetNamespace
    cgroup: Path
    chain: Chain
    node: NodeProgram
    congestion: str | None = None  # of the pods made from then on; None: the machine's own

    @contextmanager
    def pod(
        self,
        name: str,
        *,
        namespace: str = "default",
        interception: Interception | None = REDIRECT,
        annotations: Mapping[str, str] | None = None,
        first_uid: int = 0,
    ) -> Iterator[Pod]:
        """A pod, ADDed through the chain; an interception gives it Istio's mark and its rules."""
        with pod.running(
            self.name,
            name,
            self.chain,
            self.cgroup / "kubepods" / "burstable",
            self.folder / "pods" / name,
            namespace=namespace,
            interception=interception,
            annotations=annotations or {},
            first_uid=first_uid,
        ) as made:
            if self.congestion is not None:
                congestion.choose(made.netns, self.congestion)
            yield made

    def network(self, name: str, primary: Json, **conf: Any) -> Bed:
        """The same node with another network: another primary plugin, and `conf` for ours."""
        plugins = [primary]
        if len(self.chain.plugins) > 1:
            plugins.append(cni.tcpip_bypass(self.node.bpffs, self.node.state_dir, conf))
        chain = Chain(f"{self.name}-{name}", plugins, self.chain.plugin_dirs, self.host)
        return replace(self, chain=chain)

    @property
    def ipam(self) -> Path:
        """Where host-local remembers the addresses it gave, by network."""
        return self.folder / "ipam"


@contextmanager
def open_bed(*, bypass: bool = True, subnets: Sequence[str] = cni.IPV4) -> Iterator[Bed]:
    """A node of its own, gone on leaving, with whatever dead runs had left.

    With bypass, our programs are loaded and our plugin stands in the chain; without, the pods
    have plain TCP and nothing of ours runs. A pod has an address of each of the subnets.
    """
    sweep.remove_dead_runs(_live)
    name = sweep.run_name(next(_numbers))
    _live.add(name)
    folder = sweep.RUNS / name
    try:
        folder.mkdir(mode=0o755)
        with ExitStack() as stack:
            bpf_mount = folder / "bpf"
            bpf_mount.mkdir()
            subprocess.run(["mount", "-t", "bpf", name, bpf_mount], check=True)
            node = NodeProgram(bpf_mount / "tcpip-bypass", folder / "state")
            host = stack.enter_context(netns.created(f"{name}-node"))
            cgroup = stack.enter_context(cgroups.made(cgroups.mount_point() / name))
            netns.without_duplicate_detection(host)
            plugins = [cni.bridge(folder / "ipam", subnets)]
            if bypass:
                plugins.append(cni.tcpip_bypass(node.bpffs, node.state_dir))
                stack.enter_context(node.loaded())
            chain = Chain(name, plugins, [REFERENCE_PLUGINS, FROZEN_PLUGIN], host)
            yield Bed(name, folder, host, cgroup, chain, node)
    finally:
        with sweep.uninterrupted():
            sweep.remove_run(name)
            _live.discard(name)
