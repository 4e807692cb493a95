# SPDX-License-Identifier: Apache-2.0
"""Pods of other kinds than the usual one: what two of them say to each other bypasses TCP."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bed.pod import PROXY_UID, within
from tests.containerd import releases, traffic
from tests.containerd.bed import BYPASS, HOST_PORT, IPV6, TWO_NETWORKS, Pod, RuntimeBed, open_bed
from tests.containerd.cri import USUAL, Wishes
from tests.containerd.test_agent import assert_whole
from tests.containerd.test_pods import JOIN_WITHIN_S, assert_accelerated, joining, record_of
from tests.containerd.traffic import Traffic

GATEWAY = "10.244.0.1"  # the node, on the pods' bridge
ROOT = 1_000_000  # the host's user that is root of the first pod with users of its own
PYTHON = Path("/usr/bin/python3")  # what a user that the host does not know may read
FROZEN_S = 1.0
SMALL_PERCENT = 5  # of a CPU
KNOWN_S = 3.0  # in which a connection would join


@dataclass(frozen=True)
class Kind:
    """How a client and a server are made."""

    handler: str = BYPASS
    client: Wishes = USUAL
    server: Wishes = USUAL


KINDS = {
    "IPv6 only": Kind(IPV6),
    "two networks": Kind(TWO_NETWORKS),
    "a host port": Kind(HOST_PORT, server=Wishes(host_port=traffic.PORT)),
}


@dataclass(frozen=True)
class End:
    """A pod with its sandbox."""

    bed: RuntimeBed
    pod: Pod
    sandbox: str

    @property
    def address(self) -> str:
        return self.pod.address(self.sandbox)

    def interface_address(self, interface: str) -> str:
        """The IPv4 address of one of its interfaces."""
        netns = Path(f"/proc/{self.bed.cri.sandbox_status(self.sandbox).pid}/ns/net")
        show = ["ip", "-json", "-4", "address", "show", "dev", interface]
        argv = ["nsenter", f"--net={netns}", *show]
        (found,) = json.loads(self.bed.node.run(argv))
        return str(found["addr_info"][0]["local"])

    def talking(self, *arguments: str) -> list[str | Path]:
        """The command line of one side of the traffic, as a container's."""
        return self.pod.entering(self.sandbox, talker(*arguments))

    def beside_pause(self, argv: Sequence[str | Path]) -> list[str | Path]:
        """The same command in the sandbox' PID namespace, which its containers then share."""
        pid = self.bed.cri.sandbox_status(self.sandbox).pid
        return ["nsenter", f"--pid=/proc/{pid}/ns/pid", "--", *argv]

    def limit_cpu(self, percent: int | None) -> None:
        """What kubelet writes into the pod's cgroup for a resize in place; None: no limit."""
        limit = self.pod.cgroup / "cpu.max"
        if limit.exists():
            limit.write_text(f"{'max' if percent is None else percent * 1000} 100000")
            return
        cgroup = Path("/sys/fs/cgroup/cpu") / self.pod.identity.cgroup_parent[1:]
        for process in (self.pod.cgroup / "app" / "cgroup.procs").read_text().split():
            (cgroup / "cgroup.procs").write_text(process)
        quota = -1 if percent is None else percent * 1000
        (cgroup / "cpu.cfs_quota_us").write_text(str(quota))

    def as_its_proxy(self, *arguments: str) -> list[str | Path]:
        """The same by the sidecar's user of the pod's own user namespace."""
        namespaces = Path(f"/proc/{self.bed.cri.sandbox_status(self.sandbox).pid}/ns")
        (self.pod.cgroup / "app").mkdir(exist_ok=True)
        user = ["--setuid", str(PROXY_UID), "--setgid", str(PROXY_UID)]
        source = Path(traffic.__file__).read_text()
        enter = ["nsenter", f"--user={namespaces}/user", *user, "--"]
        argv: list[str | Path] = [*enter, PYTHON, "-I", "-c", source, *arguments]
        return within(argv, netns=namespaces / "net", cgroup=self.pod.cgroup / "app")


def talker(*arguments: str) -> list[str | Path]:
    return [sys.executable, "-I", traffic.__file__, *arguments]


@contextmanager
def made(bed: RuntimeBed, kind: Kind) -> Iterator[tuple[End, End]]:
    """A client and a server, with their sandboxes."""
    with ExitStack() as stack:
        try:
            client, server = (
                stack.enter_context(bed.pod(name, wishes=wishes, handler=kind.handler))
                for name, wishes in (("client", kind.client), ("server", kind.server))
            )
            yield End(bed, client, client.run_sandbox()), End(bed, server, server.run_sandbox())
        finally:
            bed.end_all_sandboxes()


def bypassed(bed: RuntimeBed, hop: str = "direct") -> dict[str, int]:
    """How many messages each pod has sent past TCP."""
    pods = json.loads(bed.node_program("status", "--json"))["pods"]
    return {pod["name"]: pod["hops"].get(hop, {}).get("bypassed_messages", 0) for pod in pods}


def wait_for_more(bed: RuntimeBed, before: dict[str, int], hop: str = "direct") -> None:
    """Until both pods have sent more past TCP than before."""
    deadline = time.monotonic() + JOIN_WITHIN_S
    while True:
        now = bypassed(bed, hop)
        if all(now[name] > count for name, count in before.items()):
            return
        assert time.monotonic() < deadline, (before, now)


@contextmanager
def exchanging(serve: Sequence[str | Path], ask: Sequence[str | Path]) -> Iterator[Traffic]:
    with traffic.started(serve), traffic.started(ask) as process:
        yield Traffic(process)


@contextmanager
def bypassing(bed: RuntimeBed) -> Iterator[tuple[End, End, Traffic]]:
    """A client, a server, and the traffic between them, which bypasses."""
    with made(bed, Kind()) as (client, server), joining(bed):
        serve, ask = server.talking("serve"), client.talking("ask", server.address)
        with exchanging(serve, ask) as load:
            wait_for_more(bed, {"client": 0, "server": 0})
            yield client, server, load


@pytest.mark.parametrize("name", KINDS)
def test_what_two_pods_say_to_each_other_bypasses_tcp(bed: RuntimeBed, name: str) -> None:
    with made(bed, KINDS[name]) as (client, server), joining(bed):
        for end in (client, server):
            assert_accelerated(bed, end.pod, end.sandbox)
        serve = server.talking("serve", "::" if ":" in server.address else "")
        with exchanging(serve, client.talking("ask", server.address)) as load:
            wait_for_more(bed, {"client": 0, "server": 0})
            assert_whole(load.end())


def test_what_goes_by_the_second_network_stays_on_tcp(bed: RuntimeBed) -> None:
    """Our entry is in the first network's configuration alone."""
    with made(bed, KINDS["two networks"]) as (client, server), joining(bed):
        second = server.interface_address("eth1")
        assert second != server.address
        with exchanging(server.talking("serve"), client.talking("ask", second)) as load:
            time.sleep(KNOWN_S)
            assert_whole(load.end())
        assert bypassed(bed) == {"client": 0, "server": 0}


def test_what_the_node_says_to_a_host_port_stays_on_tcp(bed: RuntimeBed) -> None:
    with made(bed, KINDS["a host port"]) as (_, server), joining(bed):
        ask = bed.node.entering(talker("ask", GATEWAY))
        with exchanging(server.talking("serve"), ask) as load:
            time.sleep(KNOWN_S)
            assert_whole(load.end())
        assert bypassed(bed) == {"client": 0, "server": 0}


@pytest.mark.parametrize("frozen", ["client", "server"])
def test_a_pod_that_is_frozen_for_a_while(bed: RuntimeBed, frozen: str) -> None:
    """As a checkpoint does, or a pause of its containers: with messages under way."""
    with bypassing(bed) as (client, server, load):
        cgroup = {"client": client, "server": server}[frozen].pod.cgroup
        (cgroup / "cgroup.freeze").write_text("1")
        while "frozen 1" not in (cgroup / "cgroup.events").read_text():
            time.sleep(0.001)
        before = bypassed(bed)
        time.sleep(FROZEN_S)
        assert bypassed(bed)[frozen] == before[frozen]
        (cgroup / "cgroup.freeze").write_text("0")
        wait_for_more(bed, before)
        assert_whole(load.end())


def test_a_pod_whose_containers_share_their_processes(bed: RuntimeBed) -> None:
    """shareProcessNamespace: the joiner visits them all, by their numbers outside."""
    with made(bed, Kind()) as (client, server), joining(bed):
        serve = server.beside_pause(server.talking("serve"))
        ask = client.beside_pause(client.talking("ask", server.address))
        with exchanging(serve, ask) as load:
            wait_for_more(bed, {"client": 0, "server": 0})
            assert_whole(load.end())


@pytest.mark.parametrize("resized", ["client", "server"])
def test_a_pod_that_is_resized_in_place(bed: RuntimeBed, resized: str) -> None:
    """Down to a fraction of a CPU, and up again, with messages under way."""
    with bypassing(bed) as (client, server, load):
        end = {"client": client, "server": server}[resized]
        for percent in (SMALL_PERCENT, None):
            end.limit_cpu(percent)
            wait_for_more(bed, bypassed(bed))
        assert_whole(load.end())


def test_a_container_that_comes_later(bed: RuntimeBed) -> None:
    """An ephemeral one, or an init container that is started again: another cgroup of the pod."""
    with bypassing(bed) as (client, server, load):
        ask = talker("ask", server.address)
        later = client.pod.entering(client.sandbox, ask, container="debugger")
        with traffic.started(later) as process:
            assert_whole(load.end())
            wait_for_more(bed, bypassed(bed))
            assert_whole(Traffic(process).end())


@pytest.fixture
def bed_with_users(request: pytest.FixtureRequest) -> Iterator[RuntimeBed]:
    """containerd makes user namespaces from 2 on. Debian 12's runc, 1.1.5, is good enough."""
    release = releases.get("2")
    if releases.chosen() == release:
        yield request.getfixturevalue("bed")
        return
    with open_bed(release) as made:
        yield made
        left = made.leftovers()
        assert not any(left.values()), left


def test_pods_with_users_of_their_own(bed_with_users: RuntimeBed) -> None:
    bed = bed_with_users
    kind = Kind(client=Wishes(root=ROOT), server=Wishes(root=ROOT + 65_536))
    with made(bed, kind) as (client, server), joining(bed):
        for end in (client, server):
            record = record_of(bed, end.sandbox)
            assert record is not None
            assert record.proxy_uid == end.pod.wishes.root + PROXY_UID
        serve, ask = server.as_its_proxy("serve"), client.as_its_proxy("ask", server.address)
        with exchanging(serve, ask) as load:
            wait_for_more(bed, {"client": 0, "server": 0}, "sidecars")
            assert_whole(load.end())
