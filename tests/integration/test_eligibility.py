# SPDX-License-Identifier: Apache-2.0
"""Who may not be bypassed: such connections stay on TCP, are counted, and work as ever."""

from __future__ import annotations

import errno
import os
import platform
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from bpf import abi
from bpf.loader import TAKE_IN, Programs, takes_in
from install.program import passes
from tests import light
from tests.bed import APP_UID, PROXY_UID
from tests.integration import traffic_pods, traffic_sockmap
from tests.integration.traffic_pods import (
    FIRST_BYTES,
    IPPROTO_MPTCP,
    SEEKING,
    LightNode,
    LightPod,
    accepted,
    address,
    bypassed,
    connected,
    eventually,
    exchange,
    outcomes,
    read_to_end,
    receive,
)

# include/uapi/linux: mptcp.h, tcp.h, errqueue.h, asm-generic/socket.h
SOL_MPTCP, MPTCP_INFO = 284, 1
TCP_ULP = 31
TCPI_OPT_SYN_DATA = 32
SO_ZEROCOPY, MSG_ZEROCOPY = 60, 0x4000000
SO_EE_ORIGIN_ZEROCOPY = 5
MSG_FASTOPEN = 0x20000000
FASTOPEN_WITHOUT_COOKIE = 0x1 | 0x2 | 0x4 | 0x200 | 0x400  # net.ipv4.tcp_fastopen

A, B, C = "10.9.0.1", "10.9.0.2", "10.9.0.3"


@pytest.fixture(scope="module")
def node() -> Iterator[LightNode]:
    with traffic_pods.node() as made:
        yield made


@pytest.fixture
def pods(node: LightNode) -> Iterator[tuple[LightPod, LightPod]]:
    with node.pod(A) as client, node.pod(B) as server:
        yield client, server


def is_mptcp(sock: socket.socket) -> bool:
    """Whether it is an MPTCP connection, or one that fell back but still is a socket of MPTCP's."""
    try:
        sock.getsockopt(SOL_MPTCP, MPTCP_INFO, 256)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOPROTOOPT):
            raise
        return False
    return True


def test_what_may_be_bypassed_is(pods: tuple[LightPod, LightPod]) -> None:
    """The control of every test here: nothing in the setting keeps a connection on TCP."""
    client, server = pods
    with connected(client, server) as (ours, theirs):
        sent = exchange(ours, theirs)
    assert eventually(lambda: bypassed(client, server) == sent - FIRST_BYTES)
    assert outcomes(client, server) == {"paired": 2}


# ---- MPTCP -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client_proto", "listener_proto"),
    [(IPPROTO_MPTCP, IPPROTO_MPTCP), (0, IPPROTO_MPTCP), (IPPROTO_MPTCP, 0)],
    ids=["both", "listener", "client"],
)
@pytest.mark.parametrize("host", ["0.0.0.0", "::"], ids=["ipv4", "dual-stack"])
def test_mptcp(
    pods: tuple[LightPod, LightPod], host: str, client_proto: int, listener_proto: int
) -> None:
    """An MPTCP socket never joins. Go 1.24 listens with MPTCP by default; to a plain client such a
    listener accepts an ordinary TCP socket, which joins as any other."""
    client, server = pods
    joins = client_proto == 0
    with (
        no_kernel_complaint(),
        server.listen(host=host, proto=listener_proto) as listener,
        client.connect((B, 8080), proto=client_proto) as ours,
        accepted(listener) as theirs,
    ):
        assert is_mptcp(theirs) == (client_proto == listener_proto)
        assert theirs.family == listener.family
        assert theirs.getpeername()[0].rpartition(":")[2] == A
        sent = exchange(ours, theirs)
        assert client.node.sockets() == (2 if joins else 0)
    if joins:
        assert eventually(lambda: bypassed(client, server) == sent - FIRST_BYTES)
        assert outcomes(client, server) == {"paired": 2}
    else:
        assert outcomes(client, server)["ineligible"] >= 1
        assert bypassed(client, server) == 0


@contextmanager
def no_kernel_complaint() -> Iterator[None]:
    """Nothing that looks like a warning or an oops appears in the kernel's log meanwhile."""
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.lseek(fd, 0, os.SEEK_END)
        yield
        with suppress(BlockingIOError):  # the end of the log
            while True:
                line = os.read(fd, 8192).decode(errors="replace")
                assert not re.search(r"WARNING:|BUG:|Oops|general protection", line), line
    finally:
        os.close(fd)


# ---- ULP -------------------------------------------------------------------------------------


def without_the_mptcp_rule(source: str) -> str:
    rule = "(tb_read8(sk + OFF_TCP_SOCK_IS_MPTCP) & MASK_TCP_SOCK_IS_MPTCP)"
    # No socket is really joined: an MPTCP socket in there can crash a kernel.
    joins = "if (sockhash.update(&id, socket))"
    assert (source.count(rule), source.count(joins)) == (1, 1)
    return source.replace(rule, "0").replace(joins, "if (1)")


def test_a_socket_with_a_ulp_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """kTLS needs a kernel module that not every kernel has. The kernel's other ULP is MPTCP's own,
    so that is what the rule is tried on, with the rule about MPTCP taken out."""

    def edited(*arguments: Any) -> Programs:
        limits, flags = arguments
        return light.edited(without_the_mptcp_rule, limits=limits, extra_flags=flags)

    monkeypatch.setattr(traffic_pods, "Programs", edited)
    with traffic_pods.node() as node, node.pod(A) as client, node.pod(B) as server:
        with (
            server.listen() as listener,
            client.connect((B, 8080), proto=IPPROTO_MPTCP) as ours,
            accepted(listener) as theirs,
        ):
            exchange(ours, theirs)
        assert outcomes(client) == {"paired": 1, "ineligible": 1}
        with connected(client, server) as (ours, theirs):
            exchange(ours, theirs)
        assert outcomes(client) == {"paired": 2, "ineligible": 1, "full": 1}


# ---- SO_ZEROCOPY -----------------------------------------------------------------------------


def completed(sock: socket.socket, wanted: int) -> list[tuple[int, int]]:
    """The ranges of MSG_ZEROCOPY sends that the kernel has reported done."""
    ranges: list[tuple[int, int]] = []
    sock.setblocking(False)

    def enough() -> bool:
        try:
            _, ancillary, _, _ = sock.recvmsg(1, 512, socket.MSG_ERRQUEUE)
        except BlockingIOError:
            pass
        else:
            for _, _, data in ancillary:
                _, origin, _, _, _, first, last = struct.unpack_from("IBBBBII", data)
                assert origin == SO_EE_ORIGIN_ZEROCOPY
                ranges.append((first, last))
        return sum(last - first + 1 for first, last in ranges) >= wanted

    eventually(enough)
    return ranges


@pytest.mark.parametrize("where", ["client", "listener"])
def test_zerocopy_set_before_the_connection_keeps_it_out(
    pods: tuple[LightPod, LightPod], where: str
) -> None:
    client, server = pods
    with server.listen() as listener, client.new_socket(uid=PROXY_UID) as ours:
        (ours if where == "client" else listener).setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        ours.connect((B, 8080))
        with accepted(listener) as theirs:
            exchange(ours, theirs)
            sender, receiver = (ours, theirs) if where == "client" else (theirs, ours)
            send_zerocopy(sender, receiver)
            assert completed(sender, 3) == [(0, 2)]
    assert outcomes(client, server)["ineligible"] >= 1
    assert bypassed(client, server) == 0


def test_zerocopy_set_after_joining_sends_by_tcp_and_completes(
    pods: tuple[LightPod, LightPod],
) -> None:
    client, server = pods
    with connected(client, server) as (ours, theirs):
        sent = exchange(ours, theirs)
        ours.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        by_tcp = client.total().tcp_bytes
        send_zerocopy(ours, theirs)
        assert completed(ours, 3)
    assert eventually(lambda: bypassed(client, server) >= sent - FIRST_BYTES)
    assert bypassed(client, server) == sent - FIRST_BYTES
    assert client.total().tcp_messages["ineligible"] >= 1
    assert client.total().tcp_bytes == by_tcp + 60_000


def send_zerocopy(sender: socket.socket, receiver: socket.socket) -> None:
    for letter in b"abc":
        data = bytes([letter]) * 20_000
        sender.sendmsg([data], [], MSG_ZEROCOPY)
        assert receive(receiver, len(data)) == data


# ---- TCP Fast Open ---------------------------------------------------------------------------


@pytest.mark.parametrize("server_takes_it", [True, False], ids=["taken", "refused"])
def test_fast_open(pods: tuple[LightPod, LightPod], server_takes_it: bool) -> None:
    client, server = pods
    client.sysctl("net.ipv4.tcp_fastopen", FASTOPEN_WITHOUT_COOKIE)
    server.sysctl("net.ipv4.tcp_fastopen", FASTOPEN_WITHOUT_COOKIE if server_takes_it else 0)
    with server.listen() as listener, client.new_socket(uid=PROXY_UID) as ours:
        ours.sendto(b"with the SYN", MSG_FASTOPEN, (B, 8080))
        with accepted(listener) as theirs:
            assert receive(theirs, 12) == b"with the SYN"
            syn_data = ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[5]
            assert bool(syn_data & TCPI_OPT_SYN_DATA) == server_takes_it
            sent = exchange(ours, theirs)
    assert outcomes(client, server) == {"paired": 2}
    assert eventually(lambda: bypassed(client, server) == sent - FIRST_BYTES)


# ---- Other programs' sockmaps ----------------------------------------------------------------


@pytest.mark.parametrize("kind", traffic_sockmap.KINDS)
@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_socket_of_another_programs_sockmap(
    node: LightNode, kind: traffic_sockmap.Kind, first: str
) -> None:
    theirs = traffic_sockmap.OtherProgram(kind)
    with node.pod(A, accelerated=False) as client, node.pod(B, accelerated=False) as server:
        for pod in (client, server):
            if first == "ours":
                pod.attach()
            theirs.attach(pod.cgroup)
            if first == "theirs":
                pod.attach()
        for _ in range(3):
            with connected(client, server) as (left, right):
                exchange(left, right)
                if kind == "sk_skb parser":
                    continue  # the kernel's stream parser stalls on a pipeline, without us as well
                pipeline(left, right)
        # The other takes each socket as it is born; ours would come later, and leaves it alone.
        assert (theirs.joined(), theirs.refused()) == (6, 0)
        assert outcomes(client, server)["busy"] >= 3
        assert node.sockets() == 0
        assert bypassed(client, server) == 0


@pytest.mark.parametrize("kind", traffic_sockmap.KINDS)
def test_another_programs_sockmap_takes_a_member(
    pods: tuple[LightPod, LightPod], kind: traffic_sockmap.Kind
) -> None:
    """The kernel refuses a second sk_msg program. To where a sk_skb program has come, all goes by
    TCP. A socket that both have leaves once the other has let it go."""
    client, server = pods
    node = client.node
    theirs = traffic_sockmap.OtherProgram(kind)
    with no_kernel_complaint(), connected(client, server) as ends:
        exchange(*ends)
        assert bypassed(client, server) > 0
        is_refused = kind == "sk_msg"
        assert [theirs.take(each) for each in ends] == [errno.EBUSY * is_refused] * 2
        before = bypassed(client, server)
        for sender, receiver in (ends, ends[::-1]) * 2:
            exchange(*ends)
            if kind != "sk_skb parser":  # see above
                pipeline(sender, receiver)
        goes_by_tcp = kind.startswith("sk_skb")
        if goes_by_tcp:
            assert bypassed(client, server) == before
        else:
            assert eventually(lambda: exchange(*ends) > 0 and bypassed(client, server) > before)
        assert ("leaving" in client.total().tcp_messages) is goes_by_tcp
        with node.leaving():
            leave(ends, node)
            assert node.sockets() == (0 if is_refused else 2)
            for each in () if is_refused else ends:
                theirs.let_go(each)
            leave(ends, node)
            assert node.sockets() == 0
            exchange(*ends)
    assert outcomes(client, server) == {"paired": 2}


def leave(ends: tuple[socket.socket, socket.socket], node: LightNode) -> None:
    """As many visits as leaving takes, and traffic between them."""
    for _ in range(5):
        node.visit()
        exchange(*ends)


def pipeline(sender: socket.socket, receiver: socket.socket) -> None:
    """Many messages, while they are read."""
    data = os.urandom(50_000)
    sending = threading.Thread(target=trickle, args=(sender, data))
    sending.start()
    assert receive(receiver, len(data)) == data
    sending.join()


def trickle(sock: socket.socket, data: bytes) -> None:
    for start in range(0, len(data), 1_000):
        sock.sendall(data[start : start + 1_000])


# ---- Policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize("opted_out", ["client", "server"])
@pytest.mark.parametrize(
    ("excluded", "stays_on_tcp"),
    [((8080, 8080), True), ((8000, 8080), True), ((8080, 9000), True), ((8081, 9000), False)],
)
def test_excluded_ports(
    node: LightNode, opted_out: str, excluded: tuple[int, int], stays_on_tcp: bool
) -> None:
    ports = {"client": [], "server": [], opted_out: [excluded]}
    with (
        node.pod(A, excluded=ports["client"]) as client,
        node.pod(B, excluded=ports["server"]) as server,
    ):
        with connected(client, server) as (ours, theirs):
            sent = exchange(ours, theirs)
        assert eventually(lambda: bool(outcomes(client, server)))
        if stays_on_tcp:
            assert "paired" not in outcomes(client, server)
            assert bypassed(client, server) == 0
        else:
            assert eventually(lambda: bypassed(client, server) == sent - FIRST_BYTES)


def test_an_excluded_port_that_iptables_hides(node: LightNode) -> None:
    """The application dials 3306; to the sidecar the connection comes in on 15001."""
    with node.pod(A, excluded=[(3306, 3306)]) as pod:
        redirect(pod)
        for port, is_bypassed in ((3306, False), (3307, True)):
            before = bypassed(pod)
            with (
                pod.listen(15001, uid=PROXY_UID) as envoy,
                pod.connect(("10.96.0.1", port), uid=APP_UID) as app,
                accepted(envoy) as taken,
            ):
                sent = exchange(app, taken)
            assert eventually(lambda: bypassed(pod) - before == is_bypassed * (sent - FIRST_BYTES))  # noqa: B023
        assert outcomes(pod).get("excluded") == 1


def redirect(pod: LightPod) -> None:
    """The rule of Istio's that sends an application's connections to its sidecar."""
    pod.command("iptables -t nat -A OUTPUT -p tcp -d 10.96.0.0/16 -j REDIRECT --to-ports 15001")


@pytest.mark.parametrize("which", ["client", "server", "both"])
def test_proxy_only_pods(node: LightNode, which: str) -> None:
    """Between two sidecars yes, all else no; one pod's being so is enough."""
    flags = {
        name: abi.POD_PROXY_ONLY if which in (name, "both") else 0 for name in ("client", "server")
    }
    with (
        node.pod(A, flags=flags["client"]) as client,
        node.pod(B, flags=flags["server"]) as server,
    ):
        with connected(client, server, server_uid=PROXY_UID) as (ours, theirs):
            sent = exchange(ours, theirs)
        assert eventually(lambda: bypassed(client, server) == sent - FIRST_BYTES)
        restricted = client if which == "client" else server
        uids = (APP_UID, PROXY_UID) if which == "client" else (PROXY_UID, APP_UID)
        with connected(client, server, client_uid=uids[0], server_uid=uids[1]) as (ours, theirs):
            exchange(ours, theirs)
        # Within the restricted pod: as the sidecar connects to its application.
        with connected(restricted, restricted, to=("127.0.0.1", 8080)) as (ours, theirs):
            exchange(ours, theirs)
        time.sleep(0.1)
        assert bypassed(client, server) == sent - FIRST_BYTES
        assert outcomes(client, server)["paired"] == 2


@pytest.mark.parametrize("without", ["client", "server"])
@pytest.mark.parametrize("attached", [True, False], ids=["empty record", "no program"])
def test_pods_that_are_not_accelerated(node: LightNode, without: str, attached: bool) -> None:
    with (
        node.pod(A, accelerated=without != "client") as client,
        node.pod(B, accelerated=without != "server") as server,
    ):
        bare = client if without == "client" else server
        if attached:
            bare.record = abi.Pod()
            bare.attach()
        with connected(client, server) as (ours, theirs):
            exchange(ours, theirs, rounds=SEEKING)
            assert node.sockets() == 0
        accelerated = server if without == "client" else client
        assert eventually(lambda: outcomes(accelerated) == {"no_peer": 1})
        assert bypassed(client, server) == 0


# ---- Pods that were running before they are accelerated -----------------------------------------


@pytest.mark.parametrize("within_one", [False, True], ids=["two pods", "one pod"])
@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_connections_from_before_are_taken_in(
    node: LightNode, family: str, within_one: bool
) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(node.pod(A, accelerated=False))
        server = client
        if not within_one:
            server = stack.enter_context(node.pod(B, accelerated=False))
        pods = {client.name: client, server.name: server}.values()
        host, to = ("0.0.0.0", (server.ip, 8080)) if family == "ipv4" else ("::", ("::1", 8080))
        if family == "ipv6" and not within_one:
            to = add_ipv6(client, server)
        listener = stack.enter_context(server.listen(host=host))
        ours = stack.enter_context(client.connect(to))
        theirs = stack.enter_context(accepted(listener))
        exchange(ours, theirs, rounds=SEEKING)
        for pod in pods:
            pod.attach()
        exchange(ours, theirs, rounds=SEEKING)
        assert node.sockets() == 0
        taken = sum(take_in(pod) for pod in pods)
        assert taken == (2 if takes_in(platform.release()) else 0)
        sent = exchange(ours, theirs)
        assert node.sockets() == taken
        assert sum(take_in(pod) for pod in pods) == 0
    if taken:
        assert eventually(lambda: bypassed(*pods) == sent - FIRST_BYTES)
        assert outcomes(*pods) == {"paired": 2}


@pytest.mark.skipif(not takes_in(platform.release()), reason="before Linux 6.12 none is")
def test_one_end_waits_for_the_other_to_be_taken_in(node: LightNode) -> None:
    """The pods of a node are taken in one after another, while their connections are busy."""
    with (
        node.pod(A, accelerated=False) as client,
        node.pod(B, accelerated=False) as server,
        connected(client, server) as (ours, theirs),
    ):
        for pod in (client, server):
            pod.attach()
            assert take_in(pod) == 1
            exchange(ours, theirs, rounds=4 * SEEKING)
        assert node.sockets() == 2


def take_in(pod: LightPod) -> int:
    """How many ends of the pod were: this process has its sockets open."""
    with passes.taking_in(pod.node.programs.fds[TAKE_IN], pod.cgroup):
        return passes.take_in_process(os.getpid())


def add_ipv6(client: LightPod, server: LightPod) -> tuple[str, int]:
    """Addresses of the second family; returns the server's, with its port."""
    for pod, ip in ((client, "fd00:9::1"), (server, "fd00:9::2")):
        pod.command(f"ip address add {ip}/64 dev eth0 nodad")
        pod.record.ip[1] = address(ip)
        pod.record.ip_count = 2
    return "fd00:9::2", 8080


# ---- A client whose server is not paired --------------------------------------------------------


def test_a_client_without_a_server_stays_out(node: LightNode) -> None:
    """The server's pod is gone between the SYN and the last ACK of the handshake."""
    with node.pod(A) as client, node.pod(B) as server, server.listen() as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
        with client.connect((B, 8080)) as ours:
            server.detach()
            ours.sendall(b"hello")
            with accepted(listener) as theirs:
                assert receive(theirs, 5) == b"hello"
                exchange(ours, theirs)
                assert node.sockets() == 0
                ours.shutdown(socket.SHUT_WR)
                assert read_to_end(theirs) == b""
        server.attach()
    assert bypassed(client, server) == 0
