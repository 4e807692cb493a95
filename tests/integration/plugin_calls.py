# SPDX-License-Identifier: Apache-2.0
"""One sandbox and the frozen plugin called for it, without the rest of a chain.

For tests that call the plugin hundreds of times, break it off or look at what it leaves.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyroute2

from bpf import abi, bpfsys, pins
from bpf.stats import possible_cpus
from cni_plugin import attachment, names
from cni_plugin.state import Key, State
from tests.bed import cgroups, netns
from tests.bed.bed import FROZEN_PLUGIN, Bed

# PLUGIN=path tries another build, such as the one frozen on an older distribution.
PROGRAM = Path(os.environ.get("PLUGIN", FROZEN_PLUGIN / "tcpip-bypass"))
SIDECAR = {names.SIDECAR_STATUS: "{}"}
NETWORK = "plugin-calls"
TIMEOUT_S = 60


@dataclass(frozen=True)
class Answer:
    """What one call gave back; a negative exit is the signal that killed it."""

    exit: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        return json.loads(self.stdout)


@dataclass(frozen=True)
class Sandbox:
    """One attachment of one pod, as a runtime knows it."""

    bed: Bed
    container_id: str
    uid: str
    cgroup: Path
    netns: netns.NetNamespace
    ifname: str = "eth0"
    ip: str = "10.250.0.7"
    annotations: tuple[tuple[str, str], ...] = tuple(SIDECAR.items())
    conf: tuple[tuple[str, Any], ...] = ()
    program: Path = PROGRAM

    def again(self, container_id: str) -> Sandbox:
        """The same pod's next sandbox."""
        return replace(self, container_id=container_id)

    @property
    def key(self) -> Key:
        return Key(self.container_id, self.ifname)

    @property
    def pod_id(self) -> int:
        return attachment.pod_id(*self.key)

    @property
    def result(self) -> dict[str, Any]:
        """What the plugin before ours answered."""
        return {
            "cniVersion": "1.1.0",
            "interfaces": [{"name": self.ifname, "sandbox": str(self.netns.path)}],
            "ips": [{"address": f"{self.ip}/24", "interface": 0}],
        }

    def request(self, command: str) -> dict[str, Any]:
        """The configuration on stdin; in libcni's own words for VERSION."""
        if command == "VERSION":
            return {"cniVersion": "1.1.0"}
        conf: dict[str, Any] = {
            "cniVersion": "1.1.0",
            "name": NETWORK,
            "type": names.PLUGIN,
            "bpffs": str(self.bed.node.bpffs),
            "stateDir": str(self.bed.node.state_dir),
            "mode": "full",  # whatever this machine's kernel is good for
            **dict(self.conf),
        }
        if command in {"ADD", "DEL", "CHECK"}:
            conf["prevResult"] = self.result
            conf["runtimeConfig"] = {
                names.CGROUP_PATH: "/" + str(self.cgroup.relative_to(cgroups.mount_point())),
                names.POD_ANNOTATIONS: dict(self.annotations),
            }
        if command == "GC":
            conf.setdefault(names.VALID_ATTACHMENTS, [])
        return conf

    def environment(self, command: str) -> dict[str, str]:
        """All of it: a runtime's own variables are nobody's to rely on."""
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": self.container_id,
            "CNI_NETNS": str(self.netns.path),
            "CNI_IFNAME": self.ifname,
            "CNI_PATH": "/opt/cni/bin",
            "CNI_ARGS": f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID={self.uid}",
        }

    def start(self, command: str, wrapper: Sequence[str | Path] = ()) -> subprocess.Popen[str]:
        """The call under way, its stdin written and closed."""
        process = subprocess.Popen(
            [*wrapper, self.program],
            env=self.environment(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a wrapper may close it before we have written
            process.stdin.write(json.dumps(self.request(command), separators=(",", ":")))
            process.stdin.close()
        process.stdin = None
        return process

    def call(self, command: str, wrapper: Sequence[str | Path] = ()) -> Answer:
        process = self.start(command, wrapper)
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        return Answer(process.returncode, stdout, stderr)

    def owners(self) -> list[int]:
        """The pod ID in the kernel's record of each program of ours on the cgroup."""
        inode = self.cgroup.stat().st_ino
        with attachment.open_cgroup(str(self.cgroup), inode) as cgroup_fd:
            assert cgroup_fd is not None
            with attachment.attached(cgroup_fd, inode) as found:
                return [each.record.id for each in found]

    def recorded(self) -> bool:
        return State(str(self.bed.node.state_dir)).read(self.key) is not None

    def leftovers(self) -> list[str]:
        """Everything of this attachment that can still be found, in words."""
        found = [f"program attached, record of {owner}" for owner in self.owners()]
        if State(str(self.bed.node.state_dir)).has(self.key):
            found.append("a record in the state folder")
        return [*found, *(f"counters of hop {hop}" for hop in self.counted_hops())]

    def counted_hops(self) -> list[str]:
        generation = attachment.current_generation(str(self.bed.node.bpffs))
        value_size = len(bytes(abi.Counters())) * possible_cpus()
        with bpfsys.closing(generation.open(pins.COUNTERS)) as fd:
            return [
                hop
                for number, hop in enumerate(abi.HOPS)
                if _has(fd, bytes(abi.CounterKey(pod_id=self.pod_id, hop=number)), value_size)
            ]

    def count_something(self) -> None:
        """Counters as the data path makes them for this pod."""
        generation = attachment.current_generation(str(self.bed.node.bpffs))
        with bpfsys.closing(generation.open(pins.COUNTERS)) as fd:
            for hop in range(len(abi.HOPS)):
                key = bytes(abi.CounterKey(pod_id=self.pod_id, hop=hop))
                bpfsys.map_update(fd, key, bytes(abi.Counters()) * possible_cpus())


def _has(map_fd: int, key: bytes, value_size: int) -> bool:
    try:
        bpfsys.map_lookup(map_fd, key, value_size)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def sandbox(bed: Bed, uid: str) -> Iterator[Sandbox]:
    """A pod's cgroup and namespace with its address, and nothing of ours."""
    with (
        cgroups.made(bed.cgroup / "kubepods" / f"pod{uid}") as cgroup,
        netns.created(f"{bed.name}-{uid}") as namespace,
    ):
        made = Sandbox(bed, f"{uid}-0", uid, cgroup, namespace)
        with namespace.entered(), pyroute2.IPRoute() as route:
            route.link("add", ifname=made.ifname, kind="veth", peer="peer0")
            index = route.link_lookup(ifname=made.ifname)[0]
            route.addr("add", index=index, address=made.ip, prefixlen=24)
        yield made
