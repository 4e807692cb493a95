# SPDX-License-Identifier: Apache-2.0
"""A node with a real containerd, and pods on it as kubelet makes them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from cni_plugin import names
from tests.bed import cgroups, cni
from tests.bed.bed import FROZEN_PLUGIN
from tests.bed.cni import Json
from tests.bed.node import PROGRAM
from tests.bed.pod import APP_UID, MESH, within
from tests.containerd import containerd, inventory, node, releases
from tests.containerd.containerd import NETWORK, Containerd
from tests.containerd.cri import USUAL, Cri, PodIdentity, Wishes
from tests.containerd.inventory import Inventory
from tests.containerd.node import Node
from tests.containerd.releases import Release

OWN_PLUGINS = Path(__file__).with_name("plugins")
RECORDED = "recorded"
SECOND = ("10.245.0.0/16",)  # of the second network
SETTLE_S = 30
AT_ONCE = 8

# Runtime handlers: chains that one containerd has at the same time.
BYPASS = "bypass"
PLAIN = "plain"
RECORDING = "recording"
FAILING = "failing"
IPV6 = "ipv6"
TWO_NETWORKS = "two-networks"
HOST_PORT = "host-port"


@dataclass
class Pod:
    """A pod as kubelet sees it: an identity, a cgroup, and one sandbox after another."""

    identity: PodIdentity
    cgroup: Path
    annotations: Mapping[str, str]
    wishes: Wishes
    handler: str
    _cri: Cri = field(repr=False)

    def run_sandbox(self, attempt: int = 0) -> str:
        """Make a sandbox and return its container ID.

        Raises:
            CriError: the runtime could not; so with the other methods.
        """
        return self._cri.run_sandbox(
            replace(self.identity, attempt=attempt),
            self.annotations,
            self.wishes,
            self.handler,
        )

    def end_sandbox(self, sandbox_id: str) -> None:
        """Stop and remove a sandbox, as kubelet does in this order."""
        self._cri.stop_sandbox(sandbox_id)
        self._cri.remove_sandbox(sandbox_id)

    def address(self, sandbox_id: str) -> str:
        """The sandbox' IP."""
        return self._cri.sandbox_status(sandbox_id).ip

    def entering(
        self, sandbox_id: str, argv: Sequence[str | Path], container: str = "app"
    ) -> list[str | Path]:
        """The command line that runs argv as a container of this pod would run it."""
        cgroup = self.cgroup / container
        cgroup.mkdir(exist_ok=True)
        netns = Path(f"/proc/{self._cri.sandbox_status(sandbox_id).pid}/ns/net")
        return within(argv, netns=netns, cgroup=cgroup, user=str(APP_UID))


def run(pods: Sequence[Pod], attempt: int = 0) -> list[str]:
    """A sandbox for each, all at once."""
    with ThreadPoolExecutor(len(pods)) as pool:
        return list(pool.map(lambda pod: pod.run_sandbox(attempt), pods))


@dataclass(frozen=True)
class RuntimeBed:
    """A node, its runtime, and what was on it when it counted as fresh."""

    node: Node
    containerd: Containerd
    fresh: Inventory

    @property
    def cri(self) -> Cri:
        return self.containerd.cri

    @property
    def calls(self) -> Path:
        """Where the plugins of handler RECORDING leave their recordings."""
        return self.node.folder / "calls"

    @property
    def state_dir(self) -> Path:
        """Our plugin's state folder."""
        return self.node.outside(Path(names.STATE_DIR))

    @contextmanager
    def pod(
        self,
        name: str,
        *,
        annotations: Mapping[str, str] = MESH,
        wishes: Wishes = USUAL,
        handler: str = BYPASS,
    ) -> Iterator[Pod]:
        """A pod with its cgroup and no sandbox yet; its sandboxes must be gone at the end."""
        uid = str(uuid.uuid4())
        cgroup = self.node.pods / f"pod{uid}"
        path = str(cgroup.relative_to(cgroups.mount_point()))
        try:
            with cgroups.made(cgroup):
                identity = PodIdentity(name, uid, f"/{path}")
                yield Pod(identity, cgroup, annotations, wishes, handler, self.cri)
        finally:
            node.remove_v1_cgroups(path)

    def as_it_is(self) -> RuntimeBed:
        """The same node, with what is on it now taken for fresh."""
        return replace(self, fresh=inventory.of(self.node, self.cri))

    def added(self) -> Inventory:
        """What is on the node and was not when it was fresh, by kind."""
        now = inventory.of(self.node, self.cri)
        return inventory.difference(now, self.fresh)

    def leftovers(self) -> Inventory:
        """The same, but a shim may live for a moment after its sandbox."""
        deadline = time.monotonic() + SETTLE_S
        while any((left := self.added()).values()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    def node_program(self, command: str, *options: str) -> str:
        """Run a command of tcpip-bypass-node on this node and return what it printed."""
        return self.node.run([PROGRAM, command, *options], reporting=command)

    def end_all_sandboxes(self) -> None:
        """What kubelet does about sandboxes of pods that it does not know."""

        def end(sandbox: str) -> None:
            self.cri.stop_sandbox(sandbox)
            self.cri.remove_sandbox(sandbox)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(end, self.cri.sandbox_ids()))

    def collect_garbage(self) -> None:
        """Have our plugin remove what belongs to sandboxes that are no more: CNI 1.1's GC."""
        valid = [{"containerID": each, "ifname": "eth0"} for each in self.cri.sandbox_ids()]
        entry = cni.tcpip_bypass(Path(names.BPFFS), Path(names.STATE_DIR))
        conf = {**entry, "cniVersion": "1.1.0", "name": NETWORK, names.VALID_ATTACHMENTS: valid}
        bin_dir = self.containerd.bin_dir
        environment = ["env", "CNI_COMMAND=GC", f"CNI_PATH={bin_dir}"]
        self.node.run([*environment, bin_dir / "tcpip-bypass"], stdin=json.dumps(conf))

    def remove_torn_results(self) -> None:
        """Remove what libcni was writing when it was killed.

        It writes a result in place (cacheAdd in libcni/api.go). While half of one is there, every
        DEL of that sandbox fails before a plugin is called; without it they go on.
        """
        for path in (self.node.folder / inventory.CNI_RESULTS).glob("*"):
            try:
                json.loads(path.read_bytes())
            except ValueError:
                self._remove_result(path.name)

    def _remove_result(self, name: str) -> None:
        """Through the node's overlay: an overlay still shows what was unlinked below it."""
        (self.node.inside(inventory.SEEN_RESULTS) / name).unlink()

    def remove_what_containerd_forgot(self) -> None:
        """Remove what a containerd that was killed has lost sight of; no sandbox may be left.

        containerd 1.6 makes a sandbox' network namespace, and starts its shim, before it writes
        down that it has (RunPodSandbox in pkg/cri/server/sandbox_run.go). Killed in between, it
        leaves a namespace that no plugin was called for, or a shim. From 1.7 on it may forget
        the whole sandbox, with what the other plugins gave it.
        """
        for pid, name in self.node.processes().items():
            if name == "containerd-shim":
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        left = self.added()
        for mount in left["mounts"]:
            self.node.run(["umount", mount])
        for name in left["network namespaces"]:
            (self.node.outside(inventory.NAMESPACES) / name).unlink()
        for name in left["CNI results"]:
            self._remove_result(name)
        for name in left["host-local leases"]:
            (self.node.folder / "ipam" / name).unlink()


@contextmanager
def open_bed(release: Release | None = None) -> Iterator[RuntimeBed]:
    """A node with our programs loaded and containerd running; all gone on leaving."""
    release = release or releases.chosen()
    with node.made() as made:
        _fill_bin_dir(made.folder / "bin", release)
        _install_ours(made.folder / "bin")
        (made.folder / "calls").mkdir()
        made.run([PROGRAM, "load"])
        ipam = made.folder / "ipam"
        other = {**cni.bridge(ipam, SECOND, name="cni1"), "isDefaultGateway": False}
        with containerd.running(made, _chains(ipam), release, {TWO_NETWORKS: [other]}) as runtime:
            yield RuntimeBed(made, runtime, inventory.of(made, runtime.cri))


@contextmanager
def open_bare_bed(release: Release | None = None) -> Iterator[RuntimeBed]:
    """A node that has never heard of us: one chain, PLAIN, and containerd running."""
    release = release or releases.chosen()
    with node.made() as made:
        _fill_bin_dir(made.folder / "bin", release)
        chains = {PLAIN: [cni.bridge(made.folder / "ipam")]}
        with containerd.running(made, chains, release) as runtime:
            yield RuntimeBed(made, runtime, inventory.of(made, runtime.cri))


def _chains(ipam: Path) -> dict[str, list[Json]]:
    """The chains by handler; the first one is the default. All share one range of addresses."""
    bridge = cni.bridge(ipam)
    ours = cni.tcpip_bypass(Path(names.BPFFS), Path(names.STATE_DIR))
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    return {
        BYPASS: [bridge, ours],
        PLAIN: [bridge],
        RECORDING: [_recorded(bridge), _recorded(ours)],
        FAILING: [bridge, ours, {"type": "failing"}],
        IPV6: [cni.bridge(ipam, cni.DUAL_STACK[1:], name="cni6"), ours],
        TWO_NETWORKS: [bridge, ours],
        HOST_PORT: [bridge, portmap, ours],
    }


def _recorded(plugin: Json) -> Json:
    return {**plugin, "type": f"{RECORDED}-{plugin['type']}"}


def _fill_bin_dir(folder: Path, release: Release) -> None:
    """The reference plugins."""
    folder.mkdir()
    for program in release.plugins.iterdir():
        (folder / program.name).symlink_to(program)


def _install_ours(folder: Path) -> None:
    """Our plugin, the failing one, and recorders for those to be recorded."""
    installed = shutil.copytree(FROZEN_PLUGIN, folder.with_name("tcpip-bypass"))
    (folder / "tcpip-bypass").symlink_to(installed / "tcpip-bypass")
    (folder / "failing").symlink_to(OWN_PLUGINS / "failing")
    for name in ("bridge", "tcpip-bypass"):
        (folder / f"{RECORDED}-{name}").symlink_to(OWN_PLUGINS / RECORDED)
