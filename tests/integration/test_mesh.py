# SPDX-License-Identifier: Apache-2.0
"""A whole mesh over the bypass: real Envoys, nginx, iptables, plugins; every byte checked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

from tests.bed import OPTED_OUT, Bed, Pod, bpf_objects, envoy, fetch, mesh, open_bed, sweep
from tests.bed.bed import REPOSITORY
from tests.bed.envoy import Sidecar
from tests.bed.pingpong import HOPS
from tests.integration import reach

SIZES = (0, 1, 200, 1448, 16_384, 65_537, 1 << 20)
FILES = {f"body-{size}": fetch.pattern(size) for size in SIZES}
BYPASSED = [size for size in SIZES if size < 256 * 1024]  # TB_STREAM: larger ones may go by TCP
TIMES = 20


class Pods(NamedTuple):
    bed: Bed
    client: Pod
    server: Pod


@pytest.fixture(scope="module")
def pods() -> Iterator[Pods]:
    with (
        open_bed(bypass=True) as bed,
        bed.pod("client") as client,
        bed.pod("server") as server,
    ):
        yield Pods(bed, client, server)


def fetch_all(client: Pod) -> str:
    """Fetch every file through the mesh; what the fetching program said."""
    return client.run(mesh.fetch_argv(SIZES, TIMES))


def payload(bed: Bed, *pods: Pod) -> dict[str, tuple[int, int]]:
    """Bytes that bypassed and bytes that went by TCP so far, by hop, over these pods."""
    names = {pod.name for pod in pods}
    found = [pod["hops"] for pod in bed.node.status()["pods"] if pod["name"] in names]
    return {
        hop: (
            sum(hops[hop]["bypassed_bytes"] for hops in found if hop in hops),
            sum(hops[hop]["tcp_bytes"] for hops in found if hop in hops),
        )
        for hop in HOPS
    }


def grown(after: dict[str, tuple[int, int]], before: dict[str, tuple[int, int]], hop: str) -> int:
    """How many bytes more have bypassed on a hop."""
    return after[hop][0] - before[hop][0]


@pytest.mark.parametrize("mtls", [False, True], ids=["plaintext", "mtls"])
@pytest.mark.parametrize("protocol", ["http", "tcp"])
@pytest.mark.parametrize("sendfile", [False, True], ids=["write", "sendfile"])
def test_bodies_arrive_whole_and_bypass_on_every_hop(
    pods: Pods, tmp_path: Path, mtls: bool, protocol: Literal["http", "tcp"], sendfile: bool
) -> None:
    bed, client, server = pods
    tls = envoy.make_tls(tmp_path / "tls", [client.name, server.name]) if mtls else None
    sidecar = Sidecar(endpoint=None, protocol=protocol)
    with mesh.running(client, server, FILES, sidecar=sidecar, tls=tls, sendfile=sendfile):
        before = payload(bed, client, server)
        assert fetch_all(client) == mesh.fetched(SIZES, TIMES)
        after = payload(bed, client, server)
    # Not all of them: what a fast sender sends beyond its receiver's buffer goes by TCP.
    for hop in HOPS:
        assert grown(after, before, hop) > TIMES * sum(BYPASSED) / 2, (hop, before, after)


def test_pods_with_users_of_their_own(pods: Pods) -> None:
    """`hostUsers: false`: the sidecar's user is another one to the host, in each pod."""
    bed = pods.bed
    with (
        bed.pod("users-client", first_uid=100_000) as client,
        bed.pod("users-server", first_uid=200_000) as server,
        mesh.running(client, server, FILES),
    ):
        assert fetch_all(client) == mesh.fetched(SIZES, TIMES)
        after = payload(bed, client, server)
    for hop in HOPS:
        assert after[hop][0] > TIMES * sum(BYPASSED) / 2, (hop, after)


def test_pooled_connections_bypass_all_the_time(pods: Pods) -> None:
    bed, client, server = pods
    times, fetchers = 3000, 4
    argv = [sys.executable, fetch.__file__, mesh.SERVICE_URL, str(times), "body-200=200"]
    with mesh.running(client, server, FILES):
        before, veth = reach.counted(bed, client, server), client.veth()
        # Not wrk: it closes with requests under way, and their answers meet a closed socket.
        running = [client.spawn(argv, stdout=subprocess.PIPE) for _ in range(fetchers)]
        said = [process.communicate(timeout=60)[0] for process in running]
        veth = client.veth() - veth
    after = reach.counted(bed, client, server)  # complete, now that the connections are closed
    assert said == [f"fetched {times}\n"] * fetchers
    for hop in HOPS:
        change = after[hop].since(before[hop])
        by_tcp = change.tcp_messages
        assert change.bypassed_messages > fetchers * times, (hop, change)
        others = sum(by_tcp.values()) - by_tcp["waiting"] - by_tcp.get("refresh", 0)
        # A message that meets its receiver inside a system call goes by TCP ("busy"): one in
        # hundreds, more where other programs take the receiver's CPU meanwhile.
        assert others - by_tcp.get("busy", 0) < change.bypassed_messages / 100, (hop, change)
        assert others < change.bypassed_messages / 10, (hop, change)
        if hop == "sidecars":  # handshakes and ARP besides; two packets and more for a message
            assert veth.packets < 4 * sum(by_tcp.values()) + 100


def test_a_pod_that_opted_out_still_gets_its_answers(pods: Pods) -> None:
    bed, client, _ = pods
    with bed.pod("opted-out", annotations=OPTED_OUT) as server:
        before = payload(bed, client)
        with mesh.running(client, server, FILES):
            assert fetch_all(client) == mesh.fetched(SIZES, TIMES)
        after = payload(bed, client)
    assert grown(after, before, "outbound") > TIMES * sum(BYPASSED) / 2
    assert grown(after, before, "sidecars") == 0
    assert "opted-out" not in {pod["name"] for pod in bed.node.status()["pods"]}


def test_nothing_is_left_behind() -> None:
    with open_bed(bypass=True) as bed:
        with bed.pod("client") as client, bed.pod("server") as server:
            with mesh.running(client, server, FILES):
                assert fetch_all(client) == mesh.fetched(SIZES, TIMES)
            made = bpf_objects.pinned(bed.node.bpffs)
            assert {found.kind for found in made} == {"program", "map"}
            bed.chain.check(client.attachment)
        assert bed.node.status()["pods"] == []
        assert list((bed.node.state_dir / "attachments").iterdir()) == []
    assert bpf_objects.surviving(made) == []
    assert sweep.leftovers(bed.name) == {
        "cgroups": [],
        "network namespaces": [],
        "mounts": [],
        "files": [],
    }


def test_the_demo_cleans_up_when_it_is_interrupted() -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "tests.demo"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout is not None
    said = ""
    while "round trip" not in said:  # from here on everything is set up
        line = demo.stdout.readline()
        assert line, said
        said += line
    os.killpg(demo.pid, signal.SIGINT)
    said += demo.communicate(timeout=60)[0]
    assert demo.returncode == 130, said
    assert "SIGINT: stopped" in said
    assert "Traceback" not in said
    left = sweep.leftovers(f"tb-{demo.pid}-0")
    assert not any(left.values()), left
