# SPDX-License-Identifier: Apache-2.0
"""What `status` and the metrics tell of a node with real pods and real traffic."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bpf import bpfsys, pins
from cni_plugin import names
from cni_plugin.state import Key, State
from install.program.agent.metrics import Metrics
from tests.bed import Pod, cgroups, open_bed
from tests.bed.bed import Bed
from tests.bed.cni import DUAL_STACK
from tests.bed.node import PROGRAM
from tests.integration import plugin_calls
from tests.integration.reach import in_process

ACCELERATED = {names.ENABLED: "true"}
SIZE = 1000  # bytes of a message
# What a connection sends before its ends have found each other is in no counter: some 30
# exchanges, and on a busy machine 500 of 20,000 were seen.
COUNTED = 0.95
TRAFFIC = """
import socket, sys, time
exchanges = int(sys.argv[1])

def read(sock):
    left = 1000
    while left:
        left -= len(sock.recv(left))

with socket.create_server(("127.0.0.1", 0)) as listener:
    with socket.create_connection(listener.getsockname(), timeout=20) as client:
        server, _ = listener.accept()
        server.settimeout(20)
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(exchanges):
            client.sendall(b"x" * 1000)
            read(server)
            server.sendall(b"y" * 1000)
            read(client)
"""
FOR_EVER = "1000000000"
STATES = ("accelerated", "lost", "failed")
PATIENCE_S = 60.0


@pytest.fixture
def bed() -> Iterator[Bed]:
    with open_bed(subnets=DUAL_STACK) as made:
        yield made


@pytest.fixture
def pod(bed: Bed) -> Iterator[Pod]:
    with bed.pod("talker", namespace="shop", interception=None, annotations=ACCELERATED) as made:
        yield made


def talk(pod: Pod, exchanges: int) -> int:
    """One connection inside the pod; the bytes that were sent."""
    pod.run(["/usr/bin/python3", "-c", TRAFFIC, str(exchanges)])
    return 2 * SIZE * exchanges


def of_pod(report: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (pod for pod in report["pods"] if pod["name"] == name)
    return dict(found)


def samples(metrics: Metrics) -> dict[str, float]:
    """By name and labels, as they stand in the text."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def sent_locally(found: dict[str, float]) -> float:
    return sum(
        found[f"tcpip_bypass_bytes_total{{hop=local,path={path}}}"] for path in ("bypass", "tcp")
    )


def test_status_of_a_pod_that_talks(bed: Bed, pod: Pod) -> None:
    sent = talk(pod, 200_000)
    report = bed.node.status()
    assert (report["loaded"], report["paused"], report["failures"]) == (True, False, [])
    found = of_pod(report, "talker")
    assert (found["namespace"], found["attached"], found["proxy_only"]) == ("shop", True, False)
    assert set(found["ips"]) == set(pod.ips)
    counted = found["hops"]["local"]
    all_bytes = counted["bypassed_bytes"] + counted["tcp_bytes"]
    assert COUNTED * sent < all_bytes <= sent, found["hops"]
    assert counted["bypassed_bytes"] > sent / 10  # on a busy machine joining takes its time
    assert counted["connections"] == {"paired": 2}
    table = bed.node.call("status")
    print(table)
    assert re.search(r"^1 pod accelerated by generation 1, mode ", table, re.MULTILINE)
    (row,) = re.findall(r"^ ?shop/talker +local +2 +[\d,]+ +([\d.]+ MB) .*%", table, re.MULTILINE)
    assert row == f"{counted['bypassed_bytes'] / 1e6:.1f} MB"
    for address in pod.ips:
        assert re.search(rf"^ ?{re.escape(address)}\b", table, re.MULTILINE)
    with bed.pod("quiet", interception=None, annotations=ACCELERATED):
        table = bed.node.call("status")
        assert re.search(r"default/quiet .* nothing yet", table)
        assert re.search(r"all pods +local +2 ", table)


def test_status_says_who_is_not_accelerated_and_why(bed: Bed, pod: Pod) -> None:
    """A pod whose program somebody has detached, and one whose cgroup ADD could not find."""
    with bpfsys.closing(os.open(pod.cgroup, os.O_RDONLY | os.O_DIRECTORY)) as cgroup:
        for program_id in bpfsys.prog_query(cgroup):
            with bpfsys.closing(bpfsys.prog_open(program_id)) as program:
                bpfsys.prog_detach(program, cgroup)
    with plugin_calls.sandbox(bed, "lost") as sandbox:
        nowhere = cgroups.mount_point() / "no-such-cgroup"
        elsewhere = replace(sandbox, uid="no-such-uid", cgroup=nowhere)
        answer = elsewhere.call("ADD")
        assert (answer.exit, answer.document) == (0, elsewhere.result)
        report = bed.node.status()
        assert of_pod(report, "talker")["attached"] is False
        (failure,) = report["failures"]
        assert failure["container_id"] == elsewhere.container_id
        assert failure["reason"] in answer.stderr
        assert "no-such-cgroup" in failure["reason"]
        assert abs(failure["time"] - time.time()) < 60
        table = bed.node.call("status")
        print(table)
        assert "0 pods accelerated" in table
        assert "lost its programs" in table
        assert "CgroupNotFound" in table
        found = samples(Metrics(in_process(bed)))
        states = {state: found[f"tcpip_bypass_pods{{state={state}}}"] for state in STATES}
        assert states == {"accelerated": 0, "lost": 1, "failed": 1}
        assert elsewhere.call("DEL").exit == 0
        assert bed.node.status()["failures"] == []


def test_status_of_a_node_that_is_paused_half_unloaded_and_unloaded(bed: Bed, pod: Pod) -> None:
    bed.node.call("pause")
    assert "Paused: all bytes go by TCP" in bed.node.call("status")
    (bed.node.bpffs / pins.CURRENT).unlink()
    assert "Half unloaded" in bed.node.call("status")
    State(str(bed.node.state_dir)).note_failure(Key("c0ffee", "eth0"), "shop", "cart", "why")
    bed.node.call("unload")
    assert not bed.node.state_dir.exists()
    table = bed.node.call("status")
    assert table.startswith("Not loaded: pods on this node use plain TCP.")
    assert pod.name not in table


def read_for(terminal: int, seconds: float, wanted: str) -> str:
    """What comes from a terminal until a pattern is in it."""
    text, deadline = "", time.monotonic() + seconds
    while not re.search(wanted, text):
        left = deadline - time.monotonic()
        assert left > 0, text
        if select.select([terminal], [], [], left)[0]:
            text += os.read(terminal, 65536).decode()
    return text


def rest_of(terminal: int) -> str:
    """What a process that has ended had written to its terminal."""
    text = ""
    with contextlib.suppress(OSError):  # EIO: nobody has it open any more
        while chunk := os.read(terminal, 65536):
            text += chunk.decode()
    return text


def test_watch_shows_rates_until_it_is_interrupted(bed: Bed, pod: Pod) -> None:
    pod.spawn(["/usr/bin/python3", "-c", TRAFFIC, FOR_EVER])
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 140, 0, 0))
    folders = ["--bpffs", str(bed.node.bpffs), "--state-dir", str(bed.node.state_dir)]
    process = subprocess.Popen(
        [PROGRAM, "status", "--watch", "0.3", *folders],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "140"},
    )
    try:
        os.close(theirs)
        row = r" local +- +[\d,]{3,} +[\d.]+ [kM]B "
        text = read_for(ours, 30, row)
        read_for(ours, 30, row)  # and again: it is live
        assert "bypassed/s" in text
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
        assert "Traceback" not in rest_of(ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_sums_go_on_over_loads_and_pods(bed: Bed) -> None:
    """Nothing a node goes through makes a counter smaller, or counts a byte twice."""
    metrics = Metrics(in_process(bed), per_pod=True)
    sent = 0.0
    seen = [samples(metrics)]

    def count(pod: Pod, exchanges: int) -> float:
        before = sent_locally(samples(metrics))
        most = talk(pod, exchanges)
        counted = sent_locally(samples(metrics)) - before
        assert 0 < counted <= most
        return counted

    def check() -> None:
        now = samples(metrics)
        assert sent_locally(now) == sent
        for name, value in seen[-1].items():
            family = name.partition("{")[0]
            if "_pass" in family:
                continue  # the joiner's own: they begin anew with its process, as Prometheus knows
            if family.endswith("_total") and "_pod_" not in name:
                assert now[name] >= value, name
        seen.append(now)

    for turn in range(3):
        name = f"talker-{turn}"
        with bed.pod(name, interception=None, annotations=ACCELERATED) as pod:
            check()
            sent += count(pod, 2_000 * (3 - turn))
            check()
            bed.node.load()
            check()
            sent += count(pod, 1_500)
            check()
            assert any(f"pod={name}" in each for each in seen[-1])
        check()
        assert not any(f"pod={name}" in each for each in seen[-1])
    assert seen[-1]["tcpip_bypass_generation{}"] == 4
    assert seen[-1]["tcpip_bypass_connections_total{hop=local,outcome=paired}"] == 12
    bed.node.call("unload")
    check()
    assert seen[-1]["tcpip_bypass_loaded{}"] == 0
    bed.node.load()
    with bed.pod("last", interception=None, annotations=ACCELERATED) as pod:
        sent += count(pod, 1_500)
        check()


def test_sockets_in_use_are_counted(bed: Bed, pod: Pod) -> None:
    """One connection inside the pod has two; when it is closed, they are gone."""
    metrics = Metrics(in_process(bed))
    found = samples(metrics)
    assert found["tcpip_bypass_sockets{}"] == 0
    assert found["tcpip_bypass_sockets_limit{}"] >= 65536
    talker = pod.spawn(["/usr/bin/python3", "-c", TRAFFIC, FOR_EVER])
    wait_for_sockets(metrics, 2)
    talker.terminate()
    wait_for_sockets(metrics, 0)


def wait_for_sockets(metrics: Metrics, count: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while samples(metrics)["tcpip_bypass_sockets{}"] != count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_metrics_of_a_node_whose_state_cannot_be_read(bed: Bed, pod: Pod) -> None:
    metrics = Metrics(in_process(bed))
    talk(pod, 1_500)
    attachments = bed.node.state_dir / names.ATTACHMENTS
    elsewhere = bed.folder / "attachments"
    sent = sent_locally(samples(metrics))
    assert sent > 0
    shutil.move(attachments, elsewhere)
    attachments.symlink_to(attachments)  # ELOOP, also for root
    found = samples(metrics)
    assert (found["tcpip_bypass_up{}"], sent_locally(found)) == (0, sent)
    attachments.unlink()
    shutil.move(elsewhere, attachments)
    found = samples(metrics)
    assert (found["tcpip_bypass_up{}"], sent_locally(found)) == (1, sent)
