# SPDX-License-Identifier: Apache-2.0
"""A pod: its namespace, cgroup, address and processes."""

from __future__ import annotations

import itertools
import secrets
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.bed import cgroups, istio, netns
from tests.bed.addresses import MAPPED, Family, family_of, on_the_wire
from tests.bed.cni import Attachment, Chain
from tests.bed.istio import Interception
from tests.bed.netns import LinkCounters, NetNamespace

APP_UID = 1000
PROXY_UID = 1337
APP = "app"
HELPER = "helper"  # another container of the pod's owner
PROXY = "istio-proxy"
MESH = {"sidecar.istio.io/status": '{"containers":["istio-proxy"],"revision":"default"}'}
OPTED_OUT = {"tcpip-bypass/enabled": "false"}


def within(
    argv: Sequence[str | Path],
    *,
    netns: str | Path = "-",
    cgroup: str | Path = "-",
    user: str = "-",
    cpus: str = "-",
) -> list[str | Path]:
    """The command line that runs argv there, as tests/bed/enter.py has it; "-": as the caller.

    Not by `preexec_fn`: grpc's threads, where a test has used it, may end such a child before its
    exec, and nothing would tell.
    """
    enter = Path(__file__).with_name("enter.py")
    return [sys.executable, "-I", "-S", enter, netns, cgroup, user, cpus, *argv]


@dataclass(eq=False)
class Pod:
    """A running sandbox; `spawn` and `run` start processes in its containers."""

    name: str
    attachment: Attachment
    netns: NetNamespace
    cgroup: Path
    ips: tuple[str, ...]
    folder: Path  # this pod's files: configurations, logs
    interception: Interception | None = None  # None: no sidecar
    first_uid: int = 0  # its user 0, as the host counts
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def ip(self) -> str:
        """The address that Kubernetes shows as the pod's."""
        return self.ips[0]

    def address(self, family: Family) -> str:
        """The pod's first address of a family.

        Raises:
            LookupError: it has none.
        """
        wanted = on_the_wire(family)
        for ip in self.ips:
            if family_of(ip) == wanted:
                return MAPPED + ip if family == "mapped" else ip
        raise LookupError(f"pod {self.name} has no {wanted} address, only {', '.join(self.ips)}")

    @property
    def families(self) -> tuple[Family, ...]:
        """Those that it has addresses of."""
        return tuple(dict.fromkeys(map(family_of, self.ips)))

    @property
    def tproxy(self) -> bool:
        return self.interception is not None and self.interception.mode == "TPROXY"

    def container_cgroup(self, container: str) -> Path:
        return self.cgroup / container

    def user_of(self, container: str) -> tuple[int, int]:
        """uid and gid of a container's processes, as Istio's injection sets the sidecar's; as the
        host counts."""
        uid, gid = APP_UID, APP_UID
        if container == PROXY:
            uid, gid = (0 if self.tproxy else PROXY_UID), PROXY_UID
        return self.first_uid + uid, self.first_uid + gid

    def spawn(
        self,
        argv: Sequence[str | Path],
        *,
        uid: int | None = None,
        container: str = APP,
        cpus: str = "-",
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> subprocess.Popen[str]:
        """Start a process in a container of this pod; it ends with the pod at the latest.

        uid (and gid) default to the container's.
        stdin, stdout and stderr are subprocess' constants; output goes to a file in the pod's
        folder unless told otherwise. cpus is a list as in "0,1"; "-" leaves the affinity alone.
        """
        user = ":".join(map(str, self.user_of(container) if uid is None else (uid, uid)))
        log_path = self.folder / f"{container}-{next(self._numbers)}-{Path(argv[0]).name}.log"
        cgroup = self.container_cgroup(container)
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                within(argv, netns=self.netns.path, cgroup=cgroup, user=user, cpus=cpus),
                stdin=stdin,
                stdout=log if stdout is None else stdout,
                stderr=log if stderr is None else stderr,
                cwd="/",
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        uid: int | None = None,
        container: str = APP,
        cpus: str = "-",
        timeout_s: float = 60,
    ) -> str:
        """Run a program in this pod to its end and return what it printed.

        Raises:
            RuntimeError: it failed; the message holds its output.
            subprocess.TimeoutExpired: it took longer than timeout_s (and was killed).
        """
        pipe = subprocess.PIPE
        process = self.spawn(
            argv, uid=uid, container=container, cpus=cpus, stdout=pipe, stderr=pipe
        )
        try:
            out, err = process.communicate(timeout=timeout_s)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode != 0:
            command = " ".join(map(str, argv))
            raise RuntimeError(
                f"{command} in pod {self.name} ended with {process.returncode}:\n{out}{err}"
            )
        return out

    def logs(self) -> str:
        """Everything this pod's processes have written to their log files."""
        return "".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def veth(self) -> LinkCounters:
        """What went over the pod's interface."""
        return self.netns.link_counters(self.attachment.ifname)

    def cpu_seconds(self) -> float:
        """CPU time its containers have used."""
        return cgroups.cpu_seconds(self.cgroup)

    def kill(self) -> None:
        """Kill every process of the pod and wait for those that were started from here."""
        cgroups.kill(self.cgroup)
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()


@contextmanager
def running(
    run_name: str,
    name: str,
    chain: Chain,
    pods_cgroup: Path,
    folder: Path,
    *,
    namespace: str,
    interception: Interception | None,
    annotations: Mapping[str, str],
    first_uid: int = 0,
) -> Iterator[Pod]:
    """A pod in the order of kubelet and a runtime: cgroup, sandbox, ADD, containers.

    With first_uid it has `hostUsers: false`: its user 0 is that one of the host's.

    On leaving: processes killed, DEL, namespace and cgroup removed.
    """
    uid = str(uuid.uuid4())
    with ExitStack() as stack:
        cgroup = stack.enter_context(cgroups.made(pods_cgroup / f"pod{uid}"))
        made = f"{run_name}-{name}"
        sandbox = stack.enter_context(
            netns.created_for_users(made, first_uid) if first_uid else netns.created(made)
        )
        attachment = Attachment(
            container_id=secrets.token_hex(32),
            netns=sandbox,
            pod_namespace=namespace,
            pod_name=name,
            pod_uid=uid,
            cgroup_path=f"/{cgroup.relative_to(cgroups.mount_point())}",
            annotations={**(MESH if interception else {}), **annotations},
        )
        netns.without_duplicate_detection(sandbox)
        stack.callback(chain.delete, attachment)  # a runtime calls DEL after a failed ADD as well
        result = chain.add(attachment)
        ips = tuple(ip["address"].partition("/")[0] for ip in result["ips"])
        if interception:
            ipv6 = any(family_of(ip) == "v6" for ip in ips)
            istio.intercept(sandbox, PROXY_UID, interception, ipv6=ipv6)
        for container in (APP, HELPER, PROXY):
            (cgroup / container).mkdir()
        folder.mkdir(parents=True, exist_ok=True)  # a pod of that name may have been here
        pod = Pod(name, attachment, sandbox, cgroup, ips, folder, interception, first_uid)
        stack.callback(pod.kill)
        yield pod
