"""The node: its namespace, folders and chain, and the pods on it."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bed import cgroups, cni, netns, pod, sweep
from tests.bed.cni import Chain
from tests.bed.netns import NetNamespace
from tests.bed.node import NodeProgram
from tests.bed.pod import Pod

REPOSITORY = Path(__file__).parents[2]
REFERENCE_PLUGINS = Path("/usr/lib/cni")  # Debian's and Ubuntu's containernetworking-plugins
FROZEN_PLUGIN = REPOSITORY / "dist" / "tcpip-bypass"

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

    @contextmanager
    def pod(
        self,
        name: str,
        *,
        namespace: str = "default",
        mesh: bool = True,
        annotations: Mapping[str, str] | None = None,
    ) -> Iterator[Pod]:
        """A pod, ADDed through the chain; `mesh` gives it Istio's mark and iptables rules."""
        with pod.running(
            self.name,
            name,
            self.chain,
            self.cgroup / "kubepods" / "burstable",
            self.folder / "pods" / name,
            namespace=namespace,
            mesh=mesh,
            annotations=annotations or {},
        ) as made:
            yield made


@contextmanager
def open_bed(*, bypass: bool = True) -> Iterator[Bed]:
    """A node of its own, gone on leaving, with whatever dead runs had left.

    With bypass, our programs are loaded and our plugin stands in the chain; without, the pods
    have plain TCP and nothing of ours runs.
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
            plugins = [cni.bridge(folder / "ipam")]
            if bypass:
                plugins.append(cni.tcpip_bypass(node.bpffs, node.state_dir))
                stack.enter_context(node.loaded())
            chain = Chain(name, plugins, [REFERENCE_PLUGINS, FROZEN_PLUGIN], host)
            yield Bed(name, folder, host, cgroup, chain, node)
    finally:
        with sweep.uninterrupted():
            sweep.remove_run(name)
            _live.discard(name)
