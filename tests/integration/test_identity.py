# SPDX-License-Identifier: Apache-2.0
"""Bytes reach exactly the connection they were sent on, whatever is the same or forged about it."""

from __future__ import annotations

import errno
import json
import os
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests import light
from tests.bed import APP_UID, PROXY_UID, netns
from tests.fuzz import mutants
from tests.fuzz.mutants import Edit
from tests.integration import traffic_forgery, traffic_pods, traffic_twins
from tests.integration.traffic_pods import (
    SEEKING,
    LightNode,
    LightPod,
    accepted,
    address,
    bypassed,
    connected,
    disconnect,
    eventually,
    exchange,
    outcomes,
    read_to_end,
    receive,
    reset,
    talk_all,
)
from tests.integration.traffic_twins import sequence_numbers
from tests.light import ACQUAINTANCE

SO_COOKIE = 57  # asm-generic/socket.h
A, B, C, D = "10.9.0.1", "10.9.0.2", "10.9.0.3", "10.9.0.4"


@pytest.fixture(scope="module")
def node() -> Iterator[LightNode]:
    with traffic_pods.node() as made:
        yield made


# ---- The same addresses ------------------------------------------------------------------------


def test_the_same_loopback_tuple_in_a_hundred_pods(node: LightNode) -> None:
    pods: list[LightPod] = []
    ends: list[tuple[socket.socket, socket.socket]] = []
    with ExitStack() as stack:
        for number in range(100):
            ip = f"10.9.1.{number + 1}"
            pods.append(stack.enter_context(node.pod(ip, wired=False)))
        for pod in pods:
            listener = stack.enter_context(pod.listen(host="127.0.0.1"))
            ours = pod.connect(("127.0.0.1", 8080), source=("127.0.0.1", 40_000))
            ends.append((stack.enter_context(ours), stack.enter_context(accepted(listener))))
        talk_all(ends)
        for ours, theirs in ends:
            ours.close()
            assert theirs.recv(1) == b""
            theirs.close()
        for pod in pods:
            assert eventually(lambda: bypassed(pod) > 0)  # noqa: B023
            assert outcomes(pod) == {"paired": 2}


@pytest.mark.parametrize("one_pod", [False, True], ids=["two pods", "two namespaces of one pod"])
def test_twins_that_connect_at_the_same_instant(
    node: LightNode, tmp_path: Path, one_pod: bool
) -> None:
    """Same tuple, same instant: the kernel may draw the same sequence numbers for both."""
    shared = tmp_path / "barrier"
    shared.write_bytes(bytes(16))
    with node.pod(A, wired=False) as left, node.pod(B, wired=False) as right, ExitStack() as stack:
        if one_pod:  # as docker in docker has it
            inner = stack.enter_context(netns.created(f"{node.name}-inner"))
            right = LightPod(node, "inner", inner, left.cgroup, left.ip, left.record)  # noqa: PLW2901
        twins = [
            pod.popen([sys.executable, traffic_twins.__file__, shared, str(number), "200"], uid=0)
            for number, pod in enumerate((left, right))
        ]
        while any(twin.poll() is None for twin in twins):
            node.visit(left, right)
        found = [json.loads(twin.communicate()[0]) for twin in twins]
    assert [twin["wrong"] for twin in found] == [0, 0]
    assert bypassed(left, right) > 0
    # Within 10 us of each other often enough: the setting is as hard as it says.
    both = zip(*(twin["numbers"] for twin in found))
    apart = [abs(ours[side] - theirs[side]) for ours, theirs in both for side in (0, 1)]
    assert sum(ticks * 64 <= 10_000 for ticks in apart) > len(apart) / 10


# ---- Ports used again ----------------------------------------------------------------------------


def test_a_client_port_used_again_at_once_towards_other_destinations(node: LightNode) -> None:
    seeded = random.Random(7)
    with (
        node.pod(A) as client,
        node.pod(B) as first,
        node.pod(C) as second,
        node.pod(D, accelerated=False) as third,
        first.listen() as one,
        second.listen() as two,
        third.listen() as three,
    ):
        targets = [(B, one), (C, two), (D, three)]
        for number in range(150):
            ip, listener = seeded.choice(targets)
            with (
                client.connect((ip, 8080), source=(A, 40_000)) as ours,
                accepted(listener) as theirs,
            ):
                exchange(ours, theirs, rounds=2)
                theirs.sendall(f"left behind by {number}".encode())
                reset(ours)
        # The same port to all three at the same time.
        ends = [
            (client.connect((ip, 8080), source=(A, 40_001)), accepted(listener))
            for ip, listener in targets
        ]
        with ExitStack() as stack:
            for pair in ends:
                for sock in pair:
                    stack.enter_context(sock)
            talk_all(ends)
        assert eventually(lambda: bypassed(client) > 0)
        found = outcomes(client)
        assert found["paired"] > 50


def test_nat_gives_a_client_the_port_of_another_socket(node: LightNode) -> None:
    """Port 30000 becomes 31000 on the way to the sidecar, and 31000 is another connection's."""
    with node.pod(A) as pod, node.pod(B) as elsewhere:
        pod.command("iptables -t nat -A OUTPUT -p tcp -d 10.96.0.1 -j REDIRECT --to-ports 15001")
        pod.command(
            "iptables -t nat -A POSTROUTING -p tcp -m conntrack --ctorigdst 10.96.0.1"
            f" -j SNAT --to-source {A}:31000"
        )
        with (
            pod.listen(15001, uid=PROXY_UID) as envoy,
            elsewhere.listen() as other_listener,
            pod.connect((B, 8080), uid=APP_UID, source=(A, 31_000)) as owner,
            accepted(other_listener) as other_end,
            pod.connect(("10.96.0.1", 80), uid=APP_UID, source=(A, 30_000)) as app,
            accepted(envoy) as taken,
        ):
            assert app.getsockname()[1] == 30_000
            assert taken.getpeername() == owner.getsockname() == (A, 31_000)
            talk_all([(owner, other_end), (app, taken)], rounds=20)
        assert eventually(lambda: pod.counters()["direct"].bypassed_bytes > 0)
        assert outcomes(pod).get("mismatch", 0) == 0


def test_nat_changes_the_port_because_two_connections_clash(node: LightNode) -> None:
    """One port to two services: after REDIRECT both would be the same tuple."""
    with node.pod(A) as pod:
        pod.command("iptables -t nat -A OUTPUT -p tcp -d 10.96.0.0/16 -j REDIRECT --to-ports 15001")
        with pod.listen(15001, uid=PROXY_UID) as envoy:
            for _ in range(20):
                with ExitStack() as stack:
                    pairs = []
                    for service in ("10.96.0.1", "10.96.0.2", "10.96.0.3"):
                        app = pod.connect((service, 80), uid=APP_UID, source=(A, 30_000))
                        pairs.append(
                            (stack.enter_context(app), stack.enter_context(accepted(envoy)))
                        )
                    assert len({taken.getpeername() for _, taken in pairs}) == 3
                    talk_all(pairs)
                    for app, _ in pairs:
                        reset(app)
        assert eventually(lambda: bypassed(pod) > 0)


# ---- Pods, cgroups and sockets used again --------------------------------------------------------


def test_a_pods_ip_and_cgroup_are_used_again(node: LightNode) -> None:
    """The old pod dies without a word; its peer still has both connections to it open."""
    with (
        node.pod(B) as peer,
        node.pod(A) as old,
        connected(peer, old) as (to_old, at_old),
        connected(old, peer, source=(A, 40_000)) as (from_old, old_at_peer),
    ):
        talk_all([(to_old, at_old), (from_old, old_at_peer)])
        assert bypassed(peer) > 0
        old.command("ip link delete eth0")
        old.detach()
        with node.pod(A, cgroup=old.cgroup) as new:
            peer.command("ip neighbour flush all")  # for want of the new pod's gratuitous ARP
            at_old.close()
            from_old.close()
            with (
                connected(peer, new) as (to_new, at_new),
                connected(new, peer, source=(A, 40_000)) as (from_new, new_at_peer),
            ):
                for stale in (to_old, old_at_peer):
                    with pytest.raises(ConnectionResetError):  # by the new pod
                        say_and_hear(stale)
                talk_all([(to_new, at_new), (from_new, new_at_peer)])
            assert eventually(lambda: bypassed(new) > 0)
            assert outcomes(new) == {"paired": 2}
            new.detach()


def say_and_hear(sock: socket.socket) -> None:
    sock.sendall(b"to the dead")
    sock.recv(1)


@pytest.mark.parametrize("unread", [b"", b"unread"], ids=["empty queue", "unread bytes"])
@pytest.mark.parametrize("next_is", ["accelerated", "plain", "the same"])
def test_a_socket_that_disconnects_and_connects_elsewhere(
    node: LightNode, next_is: str, unread: bytes
) -> None:
    """The old peer never hears of it, since its pod drops the RST, and goes on sending."""
    with (
        node.pod(A) as victim,
        node.pod(B) as attacker,
        node.pod(C, accelerated=next_is != "plain") as bank,
    ):
        attacker.command("iptables -A INPUT -p tcp --tcp-flags RST RST -j DROP")
        target = attacker if next_is == "the same" else bank
        with connected(victim, attacker) as (ours, old_peer):
            exchange(ours, old_peer)
            if unread:
                old_peer.sendall(unread)
            disconnect(ours)
            with target.listen(8081) as listener:
                ours.connect((target.ip, 8081))
                new_peer = accepted(listener)
            with new_peer:
                for number in range(3):
                    old_peer.sendall(b"from the grave")
                    new_peer.sendall(b"new %d" % number)
                    assert receive(ours, 5) == b"new %d" % number
                    ours.sendall(b"secret %d" % number)
                    assert receive(new_peer, 8) == b"secret %d" % number
                old_peer.setblocking(False)
                with pytest.raises(BlockingIOError):
                    old_peer.recv(100)
                ours.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    ours.recv(1)
        assert attacker.total().bypassed_bytes > 0


def may_listen(sock: socket.socket) -> bool:
    """Whether it listens now. Some kernels refuse that to a socket that was connected before."""
    try:
        sock.listen()
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def test_a_socket_that_disconnects_and_listens(node: LightNode) -> None:
    with node.pod(A) as pod, node.pod(B) as other:
        with connected(pod, other) as (ours, theirs):
            exchange(ours, theirs)
            theirs.sendall(b"unread")
            disconnect(ours)
            ours.bind((A, 9000))
            if may_listen(ours):
                with other.connect((A, 9000)) as client, accepted(ours) as server:
                    exchange(client, server)
        assert eventually(lambda: node.sockets() == 0)


# ---- Handshakes out of the ordinary --------------------------------------------------------------


def test_sockets_whose_cookies_agree_in_their_low_bits(node: LightNode) -> None:
    """A socket's key is made from its cookie, all 64 bits of it: 2^16 sockets later a new one
    must not get the key of one that is still open."""
    before, after = 300, 3000  # connections

    def cookie(sock: socket.socket) -> int:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)

    with ExitStack() as stack:
        # Cookies are dealt out by CPU, a few thousand at a time: two CPUs would leave gaps.
        for pid in (0, node.maker.process.pid):
            stack.callback(os.sched_setaffinity, pid, os.sched_getaffinity(pid))
            os.sched_setaffinity(pid, {min(os.sched_getaffinity(pid))})
        pod = stack.enter_context(node.pod(A, wired=False))
        listener = stack.enter_context(pod.listen(host="127.0.0.1"))

        def connect() -> socket.socket:
            ours = stack.enter_context(pod.connect(("127.0.0.1", 8080)))
            theirs = stack.enter_context(accepted(listener))
            for sender, receiver in ((ours, theirs), (theirs, ours)) * ACQUAINTANCE:
                sender.sendall(b"x")
                assert receive(receiver, 1) == b"x"
            used.update({cookie(ours) & 0xFFFF, cookie(theirs) & 0xFFFF})
            return ours

        used: set[int] = set()
        first = cookie(connect())
        for _ in range(before):
            connect()
        old = set(used)
        while cookie(newest := socket.socket()) < first + 2**16 - 200:
            newest.close()
        newest.close()
        used.clear()
        for _ in range(after):
            if used & old:
                break
            connect()
        assert used & old, "no two cookies agree: this has tested nothing"
        assert set(outcomes(pod)) == {"paired"}


def test_syn_cookies(node: LightNode) -> None:
    earlier = node.pending()
    with node.pod(A) as client, node.pod(B) as server:
        server.sysctl("net.ipv4.tcp_syncookies", 2)
        with server.listen() as listener:
            for _ in range(20):
                with client.connect((B, 8080)) as ours, accepted(listener) as theirs:
                    exchange(ours, theirs, rounds=2)
        assert server.tcp_ext("SyncookiesRecv") == 20
        assert eventually(lambda: bypassed(client, server) > 0)
        assert eventually(lambda: node.sockets() == 0)
        assert node.pending(but=earlier) == []


def test_simultaneous_open(node: LightNode) -> None:
    with node.pod(A) as left, node.pod(B) as right:
        for pod in (left, right):
            pod.command("iptables -A INPUT -p tcp --syn -j DROP")
        ends = []
        for pod, peer in ((left, B), (right, A)):
            sock = pod.new_socket(uid=PROXY_UID)
            sock.bind((pod.ip, 8080))
            sock.setblocking(False)
            assert sock.connect_ex((peer, 8080)) == errno.EINPROGRESS
            ends.append(sock)
        for pod in (left, right):  # the SYNs are sent again after a second
            pod.command("iptables -D INPUT -p tcp --syn -j DROP")
        with ends[0], ends[1]:
            assert eventually(lambda: all(map(is_established, ends)))
            for sock in ends:
                sock.settimeout(traffic_pods.TIMEOUT_S)
            exchange(ends[0], ends[1], rounds=SEEKING)
            ends[0].shutdown(socket.SHUT_WR)
            assert read_to_end(ends[1]) == b""
        assert outcomes(left, right) == {"no_peer": 2}
        assert bypassed(left, right) == 0


def is_established(sock: socket.socket) -> bool:
    return traffic_forgery.state(sock) == traffic_forgery.TCP_ESTABLISHED


def test_a_socket_connected_to_itself(node: LightNode) -> None:
    with node.pod(A) as pod, pod.new_socket() as sock:
        sock.bind(("127.0.0.1", 8080))
        sock.connect(("127.0.0.1", 8080))
        for _ in range(4 * SEEKING):
            sock.sendall(b"hello")
            assert receive(sock, 5) == b"hello"
        assert outcomes(pod) == {"no_peer": 1}
        assert bypassed(pod) == 0


def test_a_proxy_in_between_with_the_very_same_addresses(node: LightNode) -> None:
    """A transparent proxy in a pod of its own: to client and server it looks like the other one,
    so both ends see the same tuple, and both belong to accelerated pods."""
    tuple_ = (A, 40_000), (B, 8080)
    with (
        node.pod(A, wired=False) as client,
        node.pod(B, accelerated=False, wired=False) as facing_client,
        node.pod(A, accelerated=False, wired=False) as facing_server,
        node.pod(B, wired=False) as server,
    ):
        node.wire(client, facing_client)
        node.wire(facing_server, server)
        with facing_client.listen() as front, server.listen() as listener:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
            front.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
            with (  # both connections are being set up at the same time
                facing_server.connect(tuple_[1], source=tuple_[0]) as upstream,
                client.connect(tuple_[1], source=tuple_[0]) as ours,
            ):
                ours.sendall(b"to the proxy")
                upstream.sendall(b"from the proxy")
                with accepted(front) as downstream, accepted(listener) as theirs:
                    assert ours.getpeername() == theirs.getsockname() == tuple_[1]
                    assert ours.getsockname() == theirs.getpeername() == tuple_[0]
                    assert receive(downstream, 12) == b"to the proxy"
                    assert receive(theirs, 14) == b"from the proxy"
                    exchange(ours, downstream, rounds=SEEKING)
                    exchange(upstream, theirs, rounds=SEEKING)
        assert outcomes(client, server) == {"no_peer": 2}
        assert bypassed(client, server) == 0


# ---- Forgery -------------------------------------------------------------------------------------


@pytest.fixture
def attack(node: LightNode) -> Iterator[Attack]:
    with attacking(node) as made:
        yield made


@contextmanager
def attacking(node: LightNode) -> Iterator[Attack]:
    with (
        node.pod(A) as victim,
        node.pod(B) as server,
        node.pod(C) as attacker,
        server.listen() as listener,
    ):
        yield Attack(victim, server, attacker, listener)


class Attack:
    """A victim has a server, and another pod, the attacker, poses as that server."""

    def __init__(
        self,
        victim: LightPod,
        server: LightPod,
        attacker: LightPod,
        listener: socket.socket,
        to: tuple[str, int] = (B, 8080),
    ) -> None:
        self.victim, self.server, self.attacker, self.listener = victim, server, attacker, listener
        self.client = victim.connect(to)
        self.numbers = sequence_numbers(self.client)

    def pose(self, flip: tuple[int, int] = (0, 0)) -> socket.socket:
        """The attacker's socket that says it is the victim's server, some bits flipped."""
        victim = self.client.getsockname()
        return traffic_forgery.pose_as_server(self.attacker, victim, *self._flipped(flip))

    def look(self, forged: socket.socket, flip: tuple[int, int] = (0, 0)) -> None:
        """The attacker's socket looks for the victim's connection."""
        client_isn, server_isn = self._flipped(flip)
        victim = self.client.getsockname()
        traffic_forgery.acknowledge(self.attacker, forged, victim, client_isn, server_isn + 1)

    def _flipped(self, flip: tuple[int, int]) -> tuple[int, int]:
        first, second = (number ^ bits for number, bits in zip(self.numbers, flip))
        return first, second

    def talk(self) -> socket.socket:
        """The victim has said a word, and has entered the connection; its server's end."""
        self.client.sendall(b"first word")
        theirs = accepted(self.listener)
        assert receive(theirs, 10) == b"first word"
        assert eventually(lambda: tuple(self.numbers) in self.victim.node.pending())
        return theirs

    def assert_nothing_is_heard(self, flip: tuple[int, int] = (0, 0)) -> None:
        """The attacker looks for the victim's connection before the server does; and then the
        victim talks on with its server, and the attacker hears and says nothing."""
        with self.client, self.pose(flip) as forged, self.talk() as theirs:
            self.look(forged, flip)
            exchange(self.client, theirs)
            forged.sendall(b"from the attacker")
            exchange(self.client, theirs)
            forged.setblocking(False)
            with pytest.raises(BlockingIOError):
                forged.recv(100)
        assert eventually(lambda: bypassed(self.victim, self.server) > 0)
        assert "paired" not in outcomes(self.attacker)
        assert bypassed(self.attacker) == 0


def test_forgery_works_where_nothing_forbids_it() -> None:
    """The control: ADD has recorded the dialled IP for the attacker's pod as well, which it never
    does, and the attacker knows everything. Then it gets the victim's bytes."""
    with (
        light.source_edited(careless_joining),
        traffic_pods.node() as careless,
        attacking(careless) as attack,
    ):
        attack.attacker.record.ip[1] = address(B)
        attack.attacker.record.ip_count = 2
        attack.attacker.write_record()
        assert_it_works(attack)


def careless_joining(source: str) -> str:
    """Sockets join that have exchanged nothing, as a forger's. Nor need it get the messages that go
    by TCP."""
    source = Edit(r"at\.file\);\n\t\treturn TB_REASON_ORDER;", "at.file);").apply(source)
    known = r"tb_is_to_watch\(conn, now\) && tb_was_watched\(conn\)"
    source = Edit(known, "tb_is_paired(conn)").apply(source)
    source = mutants.PEER_UNKNOWN.apply(source)
    return mutants.ORDER.edit(source)


def assert_it_works(attack: Attack) -> None:
    with attack.client, attack.pose() as forged, attack.talk() as theirs:
        attack.look(forged)
        theirs.sendall(b"more")  # with its acknowledgement the client looks for its server
        assert attack.client.recv(4) == b"more"
        attack.client.sendall(b"once more")
        assert theirs.recv(9) == b"once more"
        theirs.sendall(b"more")
        assert attack.client.recv(4) == b"more"
        traffic_pods.visit()
        attack.client.sendall(b"secret")
        forged.settimeout(traffic_pods.TIMEOUT_S)
        assert forged.recv(100) == b"secret"
        forged.sendall(b"not what you think")
        assert attack.client.recv(100) == b"not what you think"
    assert outcomes(attack.attacker) == {"paired": 1}


@pytest.mark.parametrize("bit", [0, 7, 16, 31])
@pytest.mark.parametrize("whose", [0, 1], ids=["client's number", "server's number"])
def test_one_wrong_bit_of_a_sequence_number(attack: Attack, whose: int, bit: int) -> None:
    """Even for a pod that had the dialled IP."""
    attack.attacker.record.ip[1] = address(B)
    attack.attacker.record.ip_count = 2
    attack.attacker.write_record()
    flip = (1 << bit, 0) if whose == 0 else (0, 1 << bit)
    attack.assert_nothing_is_heard(flip)
    assert outcomes(attack.attacker) == {}  # it still looks


def test_a_pod_that_was_not_dialled(attack: Attack) -> None:
    """It knows everything, and is a pod of this node in good standing."""
    attack.assert_nothing_is_heard()
    assert outcomes(attack.attacker) == {"mismatch": 1}


def test_a_half_that_is_taken(attack: Attack) -> None:
    """Even by a pod that had the dialled IP: too late. The client has not found its server yet."""
    attack.attacker.record.ip[1] = address(B)
    attack.attacker.record.ip_count = 2
    attack.attacker.write_record()
    with attack.client, attack.pose() as forged, attack.talk() as theirs:
        theirs.sendall(b"go on")
        assert receive(attack.client, 5) == b"go on"
        attack.client.sendall(b"question")  # with its acknowledgement the server finds its client
        assert receive(theirs, 8) == b"question"
        attack.look(forged)
        assert tuple(attack.numbers) in attack.victim.node.pending()
        theirs.sendall(b"answer")
        assert receive(attack.client, 6) == b"answer"
        attack.client.sendall(b"secret")
        assert receive(theirs, 6) == b"secret"
        forged.setblocking(False)
        with pytest.raises(BlockingIOError):
            forged.recv(100)
    assert outcomes(attack.attacker) == {"mismatch": 1}


def test_posing_as_the_client(node: LightNode) -> None:
    """TCP_REPAIR makes an established client socket with any address and any numbers. It enters the
    connection before the victim does."""
    earlier = node.pending()
    with node.pod(A) as victim, node.pod(B) as server, node.pod(C) as attacker:
        with connected(victim, server, source=(A, 40_000)) as (ours, theirs):
            numbers = sequence_numbers(ours)
            forged = traffic_forgery.pose_as_client(attacker, (A, 40_000), (B, 8080), *numbers)
            with forged:
                assert node.pending(but=earlier) == [tuple(numbers)]
                exchange(ours, theirs)
                assert outcomes(attacker) == {}  # it still looks
        assert eventually(lambda: bypassed(victim, server) > 0)
        assert bypassed(attacker) == 0


def test_posing_from_another_namespace_of_the_clients_pod(node: LightNode) -> None:
    """A container may make a namespace, and give it the pod's address: unshare(CLONE_NEWUSER)."""
    with (
        node.pod(A) as victim,
        node.pod(B) as server,
        netns.created(f"{node.name}-inner") as space,
        connected(victim, server, source=(A, 40_000)) as (ours, theirs),
    ):
        victim.record.netns = victim.netns.path.stat().st_ino
        victim.write_record()
        inner = LightPod(node, "inner", space, victim.cgroup, A, victim.record)
        for line in ("add eth0 type veth peer name x0", "set x0 up", "set eth0 up"):
            inner.command(f"ip link {line}")
        inner.command("ip address add 10.9.77.1/16 dev eth0")
        numbers = sequence_numbers(ours)
        with traffic_forgery.pose_as_client(inner, (A, 40_000), (B, 8080), *numbers):
            exchange(ours, theirs)
            assert eventually(lambda: outcomes(victim, server) == {"paired": 2})
            assert eventually(lambda: bypassed(victim, server) > 0)


def test_an_address_that_is_not_the_pods(node: LightNode) -> None:
    """A pod gives itself another address and connects from it: the address is nobody's record."""
    with node.pod(A) as pod, node.pod(B) as server:
        pod.command("ip address add 10.9.7.7/16 dev eth0")
        with connected(pod, server, source=("10.9.7.7", 0)) as (ours, theirs):
            exchange(ours, theirs, rounds=SEEKING)
        assert outcomes(pod) == {"no_peer": 1}
        assert bypassed(pod, server) == 0
        server.command("ip address add 10.9.8.8/16 dev eth0")
        with connected(pod, server, to=("10.9.8.8", 8080)) as (ours, theirs):
            exchange(ours, theirs)
        assert outcomes(server).get("mismatch") == 1
        assert bypassed(pod, server) == 0
