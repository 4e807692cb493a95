# SPDX-License-Identifier: Apache-2.0
"""A node's long life: `make life`, or `python -m tests.containerd.life PODS` for fewer pods.

An agent runs on a node with a real containerd. Most pods are light: a cgroup, and the installed
plugin called for ADD and DEL. Each twentieth is the runtime's. What the node holds is counted now
and then, while no pod is there, and must not grow. docs/img/life.png is drawn from it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from bpf import pins
from cni_plugin import names
from tests.bed import cgroups
from tests.bed.bed import REPOSITORY
from tests.bed.bpf_objects import LINKS, MAPS, PROGRAMS, count_ids
from tests.bed.pod import MESH
from tests.containerd.agent import Agent
from tests.containerd.bed import AT_ONCE, PLAIN, RuntimeBed, open_bare_bed
from tests.containerd.inventory import attached

PICTURE = REPOSITORY / "docs" / "img" / "life.png"
REAL = 20  # each of so many is the runtime's
LOOKS = 40  # so often the node is looked at
KINDS = {"BPF programs": PROGRAMS, "BPF maps": MAPS, "BPF links": LINKS}
NETNS = ["unshare", "--net", "sleep", "infinity"]


def memory_kb(pid: int) -> int:
    """What a process and its children have in memory, shared pages in part (Pss)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    own = Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\nPss:")[2].split()[0]
    return int(own) + sum(memory_kb(int(child)) for child in children)


def look(agent: Agent) -> dict[str, int]:
    """What the node holds while no pod is there."""
    return {
        "agent and joiner, KB": memory_kb(agent.pid),
        "open files of the agent": len(list(Path(f"/proc/{agent.pid}/fd").iterdir())),
        **{what: count_ids(kind) for what, kind in KINDS.items()},
        "pins": sum(1 for _ in agent.bpffs.rglob("*")),
        "files of our state": sum(1 for _ in agent.bed.state_dir.rglob("*")),
        "files of the node": sum(1 for _ in agent.bed.node.folder.rglob("*")),
    }


class LightPods:
    """Calls the installed plugin on the node as its runtime would, for pods that are no more."""

    def __init__(self, agent: Agent, netns_pid: int) -> None:
        self.agent, self.netns = agent, f"/proc/{netns_pid}/ns/net"

    def live(self, number: int) -> None:
        """ADD, a look whether the pod is accelerated, DEL. Raises RuntimeError."""
        uid = str(uuid.uuid4())
        with cgroups.made(self.agent.bed.node.pods / f"pod{uid}") as cgroup:
            self._call("ADD", number, uid, cgroup)
            if attached(cgroup) != [pins.SOCK_OPS_NAME]:
                raise RuntimeError(f"pod {number} is not accelerated")
            self._call("DEL", number, uid, cgroup)
            if attached(cgroup):
                raise RuntimeError(f"DEL of pod {number} left the programs")

    def _call(self, command: str, number: int, uid: str, cgroup: Path) -> None:
        conf = {
            **(self.agent.entry() or {}),
            "cniVersion": "1.0.0",
            "name": "pods",
            "prevResult": {
                "cniVersion": "1.0.0",
                "interfaces": [{"name": "eth0", "sandbox": self.netns}],
                "ips": [{"address": f"10.251.{number >> 8 & 255}.{number & 255}/16"}],
            },
            "runtimeConfig": {
                names.CGROUP_PATH: f"/{cgroup.relative_to(cgroups.mount_point())}",
                names.POD_ANNOTATIONS: MESH,
            },
        }
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": uid,
            "CNI_NETNS": self.netns,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(self.agent.bin_dir),
            "CNI_ARGS": f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID={uid}",
        }
        mounts = f"--mount=/proc/{self.agent.bed.node.holder}/ns/mnt"
        done = subprocess.run(
            ["nsenter", mounts, "--", self.agent.bin_dir / names.PLUGIN],
            input=json.dumps(conf),
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{command} of pod {number}: {done.stdout}{done.stderr}")


def live_for_real(bed: RuntimeBed, number: int) -> None:
    """The same by the runtime."""
    with bed.pod(f"pod-{number}", handler=PLAIN) as pod:
        sandbox = pod.run_sandbox()
        is_accelerated = attached(pod.cgroup) == [pins.SOCK_OPS_NAME]
        pod.end_sandbox(sandbox)
        if not is_accelerated:
            raise RuntimeError(f"pod {number}, of the runtime, is not accelerated")


@contextmanager
def running_agent() -> Iterator[Agent]:
    """On a node that had never heard of us, and must not remember us in the end."""
    with open_bare_bed() as bed:
        agent = Agent(bed)
        agent.start_and_wait()
        try:
            yield agent
        finally:
            agent.end()
        agent.run("uninstall", "--purge", *agent.places())
        left = {kind: found for kind, found in bed.leftovers().items() if found}
        if left:
            raise RuntimeError(f"left on the node: {left}")


def run(pods: int) -> list[tuple[int, dict[str, int]]]:
    """So many lives, AT_ONCE at a time; what the node held after how many of them."""
    holder = subprocess.Popen(NETNS, start_new_session=True)
    try:
        with running_agent() as agent, ThreadPoolExecutor(AT_ONCE) as pool:
            light, looks = LightPods(agent, holder.pid), []

            def life(number: int) -> None:
                if number % REAL:
                    light.live(number)
                else:
                    live_for_real(agent.bed, number)

            step = max(1, pods // LOOKS)
            for first in range(0, pods, step):
                list(pool.map(life, range(first, min(first + step, pods))))
                time.sleep(1)  # the kernel frees programs and cgroups a grace period later
                looks.append((min(first + step, pods), look(agent)))
                print(looks[-1], flush=True)
            return looks
    finally:
        holder.kill()
        holder.wait()


def draw(looks: list[tuple[int, dict[str, int]]], path: Path) -> None:
    """A curve for each thing that was counted."""
    from matplotlib import pyplot  # noqa: PLC0415 - half a second

    figure, axes = pyplot.subplots(2, 4, figsize=(12, 4.5), sharex=True)
    for axis, what in zip(axes.flat, looks[0][1]):
        axis.plot([pods for pods, _ in looks], [found[what] for _, found in looks])
        axis.set_title(what, fontsize=9)
        axis.set_ylim(bottom=0)
    figure.supxlabel("pods that have lived on the node")
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def grown(looks: list[tuple[int, dict[str, int]]]) -> list[str]:
    """What the second half of that life held more of than the first, by a tenth."""
    half = len(looks) // 2
    found = []
    for what in looks[0][1]:
        first, second = (
            max(held[what] for _, held in part) for part in (looks[:half], looks[half:])
        )
        if second > 1.1 * first:
            found.append(f"{what}: {first}, then {second}")
    return found


def main() -> int:
    pods = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    began = time.monotonic()
    looks = run(pods)
    if pods >= 10_000:
        draw(looks, PICTURE)
    print(f"{pods} pods in {time.monotonic() - began:.0f} s; grown: {grown(looks) or 'nothing'}")
    return bool(grown(looks))


if __name__ == "__main__":
    sys.exit(main())
