# SPDX-License-Identifier: Apache-2.0
"""tcpdump sees hardly anything of a bypassed transfer, and everything while it is paused."""

from __future__ import annotations

import math
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from cni_plugin import names
from tests.bed import Bed, Pod, cni, open_bed, pingpong
from tests.bed.addresses import Family
from tests.bed.pingpong import Hop
from tests.integration import reach, traffic_pods
from tests.integration.traffic_pods import Maker, eventually

ACCELERATED = {names.ENABLED: "true"}
PAYLOAD = b"a message of the transfer that must not be seen "
# TCP segments with payload. There is no ip6[] arithmetic on the header's length: it has none.
FILTERS: dict[Family, str] = {
    "v4": "tcp and ((ip[2:2] - ((ip[0] & 0xf) << 2)) - ((tcp[12] & 0xf0) >> 2)) != 0",
    "v6": "ip6 and ip6[6] == 6 and (ip6[4:2] - ((ip6[52] & 0xf0) >> 2)) != 0",
}
WATCHED_S = 0.4
MANY = 20  # packets


class Pods(NamedTuple):
    bed: Bed
    maker: Maker
    client: Pod
    server: Pod
    other: Pod


@pytest.fixture(scope="module")
def pods() -> Iterator[Pods]:
    with ExitStack() as stack:
        bed = stack.enter_context(open_bed(subnets=cni.DUAL_STACK))
        made = [
            stack.enter_context(bed.pod(name, interception=None, annotations=ACCELERATED))
            for name in ("client", "server", "other")
        ]
        yield Pods(bed, stack.enter_context(traffic_pods.socket_maker()), *made)


@dataclass
class Dump:
    """tcpdump in a pod; `lines` grows as it prints one per packet with payload."""

    lines: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def packets(self) -> int:
        """How many packets it sees from now on, for a while."""
        before = len(self.lines)
        time.sleep(WATCHED_S)
        return len(self.lines) - before

    def is_busy(self) -> bool:
        """Whether it sees many before long."""
        before = len(self.lines)
        return eventually(lambda: len(self.lines) > before + MANY)

    def is_quiet(self) -> bool:
        """Whether for a while from now on only what refreshes conntrack goes by TCP."""
        began = time.monotonic()
        return self.packets() <= refreshed(began)

    def was_quiet(self) -> bool:
        """The same, since it began."""
        return len(self.lines) <= refreshed(self.began)


def refreshed(since: float) -> int:
    """How many messages at most: one in each second and direction."""
    return 2 * (1 + math.ceil(time.monotonic() - since))


@contextmanager
def tcpdump(pod: Pod, family: Family) -> Iterator[Dump]:
    argv = ["tcpdump", "-i", "any", "-Z", "root", "-nn", "-l", "--immediate-mode", FILTERS[family]]
    dump = Dump()
    with pod.netns.entered():
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
    assert process.stdout is not None
    assert process.stderr is not None

    def read() -> None:
        assert process.stdout is not None
        dump.lines += process.stdout

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while "listening on" not in process.stderr.readline():
            assert process.poll() is None, f"tcpdump ended with {process.returncode}"
        yield dump
    finally:
        process.kill()
        reader.join()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@contextmanager
def transfer(bed: Bed, maker: Maker, hop: Hop) -> Iterator[None]:
    """A message and its answer, all the time, each checked."""
    over = threading.Event()
    failures: list[BaseException] = []

    def talk(ours: reach.Ends) -> None:
        try:
            while not over.is_set():
                for sender, receiver in (ours, ours[::-1]):
                    sender.sendall(PAYLOAD)
                    assert traffic_pods.receive(receiver, len(PAYLOAD)) == PAYLOAD
                time.sleep(0.001)
        except BaseException as error:
            failures.append(error)

    with reach.connected(maker, hop) as ends:
        reach.join(bed, ends)
        talker = threading.Thread(target=talk, args=(ends,))
        talker.start()
        try:
            yield
        finally:
            over.set()
            talker.join()
    assert failures == []


@pytest.mark.parametrize("family", ["v4", "v6"])
def test_tcpdump_sees_a_transfer_while_the_node_is_paused(pods: Pods, family: Family) -> None:
    bed, maker, client, server, _ = pods
    hop = pingpong.hop("direct", client, server, family)
    with transfer(bed, maker, hop), tcpdump(client, family) as dump:
        assert dump.is_quiet()
        with reach.paused(bed):
            assert dump.is_busy()
        dump.packets()  # the last one by TCP must be consumed first
        assert dump.is_quiet()


@pytest.mark.parametrize("paused", ["client", "server"])
@pytest.mark.parametrize("family", ["v4", "v6"])
def test_tcpdump_sees_the_transfers_of_a_paused_pod_and_of_no_other(
    pods: Pods, family: Family, paused: str
) -> None:
    bed, maker, client, server, other = pods
    pod = client if paused == "client" else server
    bystander = server if paused == "client" else client
    hop = pingpong.hop("direct", client, server, family)
    others = pingpong.hop("direct", bystander, other, family)
    with (
        transfer(bed, maker, hop),
        transfer(bed, maker, others),
        tcpdump(pod, family) as dump,
        tcpdump(other, family) as others_dump,
    ):
        assert dump.is_quiet()
        with reach.paused(bed, "--pod", f"default/{pod.name}"):
            assert dump.is_busy()
        dump.packets()
        assert dump.is_quiet()
        assert others_dump.was_quiet()


def test_a_pod_that_is_not_there(pods: Pods) -> None:
    with pytest.raises(RuntimeError, match="default/nobody"):
        pods.bed.node.call("pause", "--pod", "default/nobody")


def test_a_connection_made_while_the_pod_was_paused(pods: Pods) -> None:
    """It is set up as ever, goes by TCP, and bypasses once the pod is resumed."""
    bed, maker, client, server, _ = pods
    with ExitStack() as stack:
        with reach.paused(bed, "--pod", "default/client"):
            before = reach.total(bed, client, server).bypassed_bytes
            ends = stack.enter_context(
                reach.connected(maker, pingpong.hop("direct", client, server))
            )
            reach.join(bed, ends)
            traffic_pods.exchange(*ends)
            assert reach.total(bed, client, server).bypassed_bytes == before
        reach.visit(bed)
        traffic_pods.exchange(*ends)
        assert traffic_pods.eventually(
            lambda: reach.total(bed, client, server).bypassed_bytes > before
        )
