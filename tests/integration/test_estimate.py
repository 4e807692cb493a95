# SPDX-License-Identifier: Apache-2.0
"""`estimate` on a mesh without the bypass, against what bypasses there once it is on."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import pytest

from cni_plugin import netconf, policy
from install.program.estimate import pods as of_pods
from install.program.estimate import sockets
from install.program.estimate.survey import Estimate, Survey
from tests import capabilities, manifests
from tests.bed import OPTED_OUT, Bed, Pod, cni, fetch, mesh, open_bed
from tests.bed.addresses import Family
from tests.bed.envoy import Sidecar
from tests.bed.node import PROGRAM
from tests.bed.pingpong import HOPS, HopName

SIZE = 16_384
FILES = {"body": fetch.pattern(SIZE)}
FETCHERS = 4
REQUESTS = 500
FOR_EVER = 1_000_000
SECONDS = 3.0
CLOSE = 0.05  # how far a hop's share may be off
CONF = netconf.parse({})
Protocol = Literal["http", "tcp"]

# Python reads with a time-out from a non-blocking socket.
CLIENT = """
import http.client, sys
connection = http.client.HTTPConnection(sys.argv[1], timeout=60)
for line in sys.stdin:
    for _ in range(int(line)):
        connection.request("GET", "/body")
        connection.getresponse().read()
    print("done", flush=True)
"""
BLOCKING = """
import socket, sys, time
with socket.create_server(("127.0.0.1", 0)) as listener:
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    server.setblocking(sys.argv[1] == "blocking")
    client.setblocking(False)
    if sys.argv[1] == "rcvbuf":
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    while True:
        for one, other in ((client, server), (server, client)):
            one.send(b"x" * 100)
            time.sleep(0.005)
            other.recv(100)
"""


def described(pod: Pod) -> of_pods.Pod:
    """The pod, as the runtime would tell of it."""
    attachment = pod.attachment
    return of_pods.planned(
        CONF,
        policy.Pod("default", pod.name, attachment.pod_uid, attachment.annotations),
        str(pod.netns.path),
        frozenset(pod.ips),
    )


@contextmanager
def load(client: Pod) -> Iterator[None]:
    """Requests through the mesh all the time, on connections that stay."""
    argv = [sys.executable, fetch.__file__, mesh.SERVICE_URL, str(FOR_EVER), f"body={SIZE}"]
    running = [client.spawn(argv, stdout=subprocess.PIPE) for _ in range(FETCHERS)]
    try:
        client.run([sys.executable, fetch.__file__, mesh.SERVICE_URL, "50", f"body={SIZE}"])
        yield
        assert all(each.poll() is None for each in running)
    finally:
        for each in running:
            each.kill()
            each.wait()


def estimated(*pods: Pod) -> Estimate:
    survey = Survey([described(pod) for pod in pods], Path("/proc"))
    return survey.run(SECONDS)


def counted(bed: Bed) -> dict[str, int]:
    """Bytes that bypassed, by hop."""
    found = [pod["hops"] for pod in bed.node.status()["pods"]]
    return {hop: sum(hops[hop]["bypassed_bytes"] for hops in found if hop in hops) for hop in HOPS}


@contextmanager
def meshed(
    protocol: Protocol, family: Family, *, bypass: bool
) -> Iterator[tuple[Bed, list[Pod], list[subprocess.Popen[str]]]]:
    """A node with two clients, one of whose servers has opted out; the clients wait for a line."""
    sidecar = Sidecar(endpoint=None, protocol=protocol)
    with ExitStack() as stack:
        bed = stack.enter_context(open_bed(bypass=bypass, subnets=cni.DUAL_STACK))
        pods, clients = [], []
        for name, annotations in (("one", {}), ("two", OPTED_OUT)):
            client = stack.enter_context(bed.pod(f"client-{name}"))
            server = stack.enter_context(bed.pod(f"server-{name}", annotations=annotations))
            stack.enter_context(mesh.running(client, server, FILES, sidecar=sidecar, family=family))
            host = mesh.service_url(family).removeprefix("http://")
            pipe = subprocess.PIPE
            argv = [sys.executable, "-c", CLIENT, host]
            clients.append(client.spawn(argv, stdin=pipe, stdout=pipe))
            pods += [client, server]
        yield bed, pods, clients


def ask(clients: list[subprocess.Popen[str]], requests: int = REQUESTS) -> None:
    """So many requests each; the connections stay."""
    for each in clients:
        assert each.stdin is not None
        each.stdin.write(f"{requests}\n")
        each.stdin.flush()
    for each in clients:
        assert each.stdout is not None
        assert each.stdout.readline() == "done\n"


def let_join(bed: Bed, clients: list[subprocess.Popen[str]], would: dict[HopName, int]) -> None:
    """Some requests at a time, until their share of `would` (bytes by hop) has bypassed."""
    requests = REQUESTS // 10
    now: dict[str, int] = {}
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        before = counted(bed)
        ask(clients, requests)
        now = {hop: size - before[hop] for hop, size in counted(bed).items()}
        if all(now[hop] > (1 - CLOSE) * would[hop] / 10 for hop in HOPS):
            return
        time.sleep(0.5)
    raise AssertionError(f"not all connections have joined: {now} of a tenth of {would}")


def bypassed(bed: Bed, clients: list[subprocess.Popen[str]]) -> dict[HopName, int]:
    """Bytes by hop, of one series of requests."""
    before = counted(bed)
    ask(clients)
    after = counted(bed)
    return {hop: after[hop] - before[hop] for hop in HOPS}


@pytest.mark.parametrize(("protocol", "family"), [("http", "v4"), ("tcp", "v4"), ("http", "v6")])
def test_hop_shares_are_what_bypasses_once_it_is_on(protocol: Protocol, family: Family) -> None:
    with meshed(protocol, family, bypass=False) as (_, pods, clients):
        survey = Survey([described(pod) for pod in pods], Path("/proc"))
        survey.look()
        ask(clients)
        survey.look()
        found = survey.result(seconds=1.0)
    would = {hop: found.total[hop].bypass.bytes for hop in HOPS}
    with meshed(protocol, family, bypass=True) as (bed, _, clients):
        let_join(bed, clients, would)
        # On a machine that is busy elsewhere more goes by TCP: a message in each second, for one.
        for _ in range(10):
            did = bypassed(bed, clients)
            if would == pytest.approx(did, rel=CLOSE):
                break
    print({hop: (would[hop], did[hop]) for hop in HOPS})
    for hop in HOPS:
        assert would[hop] == pytest.approx(did[hop], rel=CLOSE)
        share, did_share = (each[hop] / sum(each.values()) for each in (would, did))
        assert share == pytest.approx(did_share, abs=CLOSE)
    # One of the servers has opted out, so its calls do not bypass behind the client's sidecar.
    assert would["outbound"] > 1.8 * would["sidecars"] > 0
    assert found.share_on_node == pytest.approx(1.0, abs=CLOSE)
    assert found.saved_cpu("full") > found.saved_cpu("proxy-only") > 0


def test_a_pod_that_opted_out_and_one_that_is_elsewhere() -> None:
    with (
        open_bed(bypass=False) as bed,
        bed.pod("client") as client,
        bed.pod("server", annotations=OPTED_OUT) as server,
        mesh.running(client, server, FILES),
        load(client),
    ):
        both = estimated(client, server)
        alone = estimated(client)
    (reason,) = both.total["sidecars"].tcp
    assert "tcpip-bypass/enabled is false" in reason
    assert both.total["sidecars"].bypass.bytes == 0
    assert both.total["inbound"].bypass.bytes == 0
    assert both.total["outbound"].bypass.bytes > 0
    # With the server's pod elsewhere, nothing stays on the node but the way to the sidecar.
    assert alone.share_on_node == 0
    assert set(alone.total["none"].tcp) == {"the other end is not on this node"}
    assert alone.total["outbound"].bypass.bytes > 0
    assert "sidecars" not in alone.total


@pytest.mark.parametrize(
    ("how", "reason"), [("blocking", "blocking reader"), ("rcvbuf", "SO_RCVBUF"), ("plain", None)]
)
def test_sockets_that_could_not(how: str, reason: str | None) -> None:
    with (
        open_bed(bypass=False) as bed,
        bed.pod("talker", interception=None, annotations={"tcpip-bypass/enabled": "true"}) as pod,
    ):
        program = [sys.executable, "-c", BLOCKING, how]
        talker = pod.spawn(program)
        while not any(each.local[1] for each in established(pod)):
            assert talker.poll() is None, pod.logs()
        found = estimated(pod)
    traffic = found.total["local"]
    if reason is None:
        assert (traffic.bypass.connections, traffic.tcp) == (2, {})
    else:
        assert set(traffic.tcp) == {reason}
        assert traffic.bypass.connections == 0
    assert found.unseen_files == 0


def test_with_the_capabilities_of_the_job() -> None:
    """No runtime here, so pods go by their network namespaces; other tests' are among them."""
    (job,) = manifests.documents(manifests.ESTIMATE)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    granted = container["securityContext"]["capabilities"]["add"]
    options = ("--seconds", "1", "--json", "--conf-json", '{"scope": "all"}')
    with open_bed(bypass=False) as bed, bed.pod("talker", interception=None) as pod:
        talker = pod.spawn([sys.executable, "-c", BLOCKING, "blocking"])
        while not established(pod):
            assert talker.poll() is None, pod.logs()
        done = subprocess.run(
            [
                *capabilities.with_only(granted),
                *(PROGRAM, "estimate", "--cri-socket", "/no/such", *options),
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=180,
        )
        name = f"netns-{pod.netns.path.stat().st_ino}"
    (found,) = [each for each in json.loads(done.stdout)["pods"] if each["name"] == name]
    assert set(found["hops"]["local"]["tcp"]) == {"blocking reader"}
    assert "no container runtime" in done.stderr


def established(pod: Pod) -> list[sockets.Socket]:
    found = sockets.dump(str(pod.netns.path)).sockets
    return [each for each in found if each.state == "ESTABLISHED" and each.segments > 10]
