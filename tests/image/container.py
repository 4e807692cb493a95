# SPDX-License-Identifier: Apache-2.0
"""The DaemonSet's container on this machine, as a kubelet and containerd would have runc start it.

After containerd, internal/cri/server/container_create.go, and the OCI runtime specification: the
node's network and PIDs, all other namespaces its own, cgroup's included (containerd gives it to
unprivileged pods), the capabilities of the manifest and no others, a read-only root. Left out:
seccomp, AppArmor and SELinux, for which there is no profile without a runtime; and cgroup limits.

The volumes are folders of a scratch node, but for cgroup2. Its /proc is that of a PID namespace, in
which process 1 is root with all capabilities, as everywhere; this machine's may be beyond reach.
"""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import capabilities, manifests
from tests.bed import sweep
from tests.image.dockerfile import PATH, Stage
from tests.manifests import Json

CGROUP = "cgroup"  # the volume that is this machine's own
TIMEOUT_S = 180
_PROPAGATION = {"None": "rprivate", "HostToContainer": "rslave"}
_OWN_MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
]

_numbers = itertools.count()


@dataclass(frozen=True)
class Answer:
    """How a container ended, and what it wrote to stdout and stderr."""

    status: int
    printed: str
    said: str


@dataclass(frozen=True)
class ScratchNode:
    """The places of a node that the pod is given, and the image's root, mounted."""

    name: str
    disk: Path
    entrypoint: tuple[str, ...]

    def volume(self, name: str) -> Path:
        """The folder behind one of the manifest's volumes."""
        return self.disk / name

    def run(self, *arguments: str) -> Answer:
        """The container with these arguments, to its end."""
        container = f"{self.name}-{next(_numbers)}"
        bundle = self.disk / container
        bundle.mkdir()
        config = self._config(manifests.documents(manifests.DAEMONSET), arguments)
        (bundle / "config.json").write_text(json.dumps(config))
        done = subprocess.run(
            ["runc", "--root", self.disk / "runc", "run", "--bundle", bundle, container],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def _config(self, objects: list[Json], arguments: Sequence[str]) -> Json:
        """config.json of the OCI runtime specification."""
        spec, container = manifests.pod_spec(objects), manifests.agent(objects)
        security = container["securityContext"]
        names = manifests.capabilities(objects) & capabilities.of_this_machine()
        granted = [f"CAP_{name}" for name in sorted(names)]
        mounts = [self._bind(spec, each) for each in container["volumeMounts"]]
        return {
            "ociVersion": "1.0.2",
            "root": {"path": f"{self.disk}/root", "readonly": security["readOnlyRootFilesystem"]},
            "process": {
                "user": {"uid": security["runAsUser"], "gid": 0},
                "args": [*self.entrypoint, *arguments],
                "env": [f"PATH={PATH}"],
                "cwd": "/",
                "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), granted),
            },
            "mounts": [*_OWN_MOUNTS, *mounts],
            "linux": {
                "namespaces": [{"type": each} for each in ("mount", "ipc", "uts", "cgroup")],
                "rootfsPropagation": "rslave",
                "cgroupsPath": f"/{self.name}",
            },
        }

    def _bind(self, spec: Json, mount: Json) -> Json:
        name = mount["name"]
        (volume,) = [each for each in spec["volumes"] if each["name"] == name]
        propagation = _PROPAGATION[mount.get("mountPropagation", "None")]
        return {
            "destination": mount["mountPath"],
            "type": "bind",
            "source": volume["hostPath"]["path"] if name == CGROUP else str(self.volume(name)),
            "options": ["rbind", propagation, "ro" if mount.get("readOnly") else "rw"],
        }


@contextmanager
def scratch_node(image: Stage) -> Iterator[ScratchNode]:
    """A node with an empty folder for every volume, and a bpffs; all gone on leaving."""
    name = sweep.run_name(next(_numbers))
    folder = sweep.RUNS / name
    disk = folder / "disk"
    try:
        disk.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", "mode=755", "disk", disk)  # /run may be noexec
        for each in ("root", "upper", "work", "runc", *_volumes()):
            (disk / each).mkdir()
        _mount("-t", "bpf", name, disk / "bpffs")
        layers = f"lowerdir={image.lower},upperdir={disk}/upper,workdir={disk}/work"
        _mount("-t", "overlay", "-o", layers, "image", disk / "root")
        with _process_1(disk / "proc"):
            yield ScratchNode(name, disk, image.entrypoint)
    finally:
        with sweep.uninterrupted():
            sweep.remove_run(name)


@contextmanager
def _process_1(proc: Path) -> Iterator[None]:
    """Another PID namespace with one process in it, and its /proc mounted."""
    process_1 = ["sh", "-c", "echo; exec cat"]
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", *process_1], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()  # until then its children's namespace is this machine's own
        namespace = f"/proc/{holder.pid}/ns/pid_for_children"
        subprocess.run(
            ["nsenter", f"--pid={namespace}", "mount", "-t", "proc", "proc", proc], check=True
        )
        yield  # then its standard input is closed, and it ends


def _volumes() -> set[str]:
    spec = manifests.pod_spec(manifests.documents(manifests.DAEMONSET))
    return {each["name"] for each in spec["volumes"]}


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)
