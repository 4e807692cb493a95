# SPDX-License-Identifier: Apache-2.0
"""How a connection begins."""

from __future__ import annotations

import ctypes
import errno
import select
import socket
import struct
import time

from tests.light import ACQUAINTANCE, CLIENT_IP, SERVER_IP, set_nodelay
from tests.semantics.scenario import (
    OPTIONS,
    PATIENCE_S,
    SETTLE_S,
    Background,
    Io,
    Limit,
    as_before,
    attempt,
    configure,
    exactly,
    exchanged,
    libc,
    poll_mask,
    recv,
    scenario,
    settle,
    to_end,
)

IPPROTO_MPTCP = 262
MSG_FASTOPEN = 0x20000000


@scenario(bypassed=None)
def server_speaks_first(io: Io) -> None:
    """The server greets, the client answers"""
    sender, receiver = io.pair(greet=False)
    client, server = (sender, receiver) if io.upstream else (receiver, sender)
    server.sendall(b"220 ready")
    io.log("client", client.recv(100))
    client.sendall(b"HELO")
    io.log("server", server.recv(100))
    server.sendall(b"250 welcome")
    io.log("client then", client.recv(100))


@scenario(bypassed=False)
def data_before_accept(io: Io) -> None:
    """The client has sent a lot before the server accepts"""
    sender, receiver = io.pair(greet=False, client_first=b"x" * 20_000)
    client, server = (sender, receiver) if io.upstream else (receiver, sender)
    client.sendall(b"y" * 1000)
    client.shutdown(socket.SHUT_WR)
    io.log("server", to_end(server))
    server.sendall(b"answer")
    server.close()
    io.log("client", to_end(client))


@scenario()
def accepted_late(io: Io) -> None:
    """accept long after the client has sent its first request"""
    listener = io.listener()
    client = socket.socket()
    client.bind((CLIENT_IP, 0))
    client.connect(listener.getsockname())
    client.sendall(b"request")
    time.sleep(4 * SETTLE_S)
    server, _ = listener.accept()
    io.log("request", exactly(server, 7))
    server.sendall(b"reply")
    io.log("reply", exactly(client, 5))
    questions(io, client, server)


@scenario()
def idle_at_first(io: Io) -> None:
    """A connection that is idle for long before its first byte"""
    sender, receiver = io.pair(greet=False)
    time.sleep(10 * SETTLE_S)
    sender.sendall(b"request")
    io.log("request", exactly(receiver, 7))
    receiver.sendall(b"reply")
    io.log("reply", exactly(sender, 5))
    questions(io, sender, receiver)


def questions(io: Io, asker: socket.socket, other: socket.socket) -> None:
    """Five more exchanges, once both ends have joined where they shall."""
    exchanged(asker, other, ACQUAINTANCE)
    io.join()
    for number in range(5):
        asker.sendall(b"question %d" % number)
        io.log(f"question {number}", other.recv(100))
        other.sendall(b"answer %d" % number)
        io.log(f"answer {number}", asker.recv(100))


@scenario(bypassed=None)
def deferred_accept(io: Io) -> None:
    """A listener with TCP_DEFER_ACCEPT and pipelined writes, fifty times"""
    corrupted = 0
    for _ in range(50):
        listener = io.listener(TCP_DEFER_ACCEPT=1)
        with socket.socket() as client:
            client.bind((CLIENT_IP, 0))
            client.connect(listener.getsockname())
            client.sendall(b"0")
            server, _ = listener.accept()
            for digit in b"123456789":
                client.sendall(bytes([digit]))
            client.shutdown(socket.SHUT_WR)
            with server:
                corrupted += to_end(server) != [b"0123456789", "EOF"]
        listener.close()
    io.log("corrupted connections", corrupted)


@scenario()
def nonblocking_connect(io: Io) -> None:
    """connect on a non-blocking socket, and the event that says it stands"""
    listener = io.listener()
    client = socket.socket()
    client.setblocking(False)
    client.bind((CLIENT_IP, 0))
    io.log("connect", attempt(client.connect, listener.getsockname()))
    io.log("poll", poll_mask(client, PATIENCE_S))
    io.log("SO_ERROR", client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    server, _ = listener.accept()
    as_before(client)
    io.greeted(client, server)
    sender, receiver = io.directed(client, server)
    sender.sendall(b"data")
    io.log("received", receiver.recv(100))


@scenario()
def addresses(io: Io) -> None:
    """getsockname and getpeername"""
    sender, receiver = io.pair()
    client, server = (sender, receiver) if io.upstream else (receiver, sender)
    io.log("client", client.getsockname()[0])
    io.log("server", server.getsockname()[0])
    io.log("each other's", client.getsockname() == server.getpeername())
    io.log("and back", client.getpeername() == server.getsockname())


@scenario(
    Limit(
        "Between connect(AF_UNSPEC) and the next connect, recv returns unread bytes of the old "
        "connection instead of an error; the new connection never sees them",
        "nothing: hardly any program disconnects a TCP socket",
    )
)
def disconnected_and_reused(io: Io) -> None:
    """connect(AF_UNSPEC) with data unread, then a connection to somebody else"""
    sender, receiver = io.pair()
    client, server = (sender, receiver) if io.upstream else (receiver, sender)
    server.sendall(b"of the old connection")
    settle()
    io.log("disconnect", libc.connect(client.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16))
    io.log("recv", recv(client, 100, socket.MSG_DONTWAIT))
    other = io.listener()
    client.connect(other.getsockname())
    successor, _ = other.accept()
    late = b"late, of the old connection"
    io.log("the old server's send", attempt(server.send, late, socket.MSG_NOSIGNAL))
    io.log("fails again", isinstance(attempt(server.send, late, socket.MSG_NOSIGNAL), str))
    for number in range(3):
        client.sendall(b"question %d" % number)
        io.log(f"question {number}", successor.recv(100))
        successor.sendall(b"answer %d" % number)
        io.log(f"answer {number}", client.recv(100))
    successor.close()
    io.log("end", to_end(client))


@scenario(bypassed=False)
def mptcp(io: Io) -> None:
    """MPTCP at both ends"""
    mptcp_connection(io, IPPROTO_MPTCP, IPPROTO_MPTCP)


@scenario(bypassed=None)
def mptcp_listener(io: Io) -> None:
    """A plain client to an MPTCP listener, as Go makes them"""
    mptcp_connection(io, 0, IPPROTO_MPTCP)


@scenario(bypassed=False)
def mptcp_client(io: Io) -> None:
    """An MPTCP client to a plain listener"""
    mptcp_connection(io, IPPROTO_MPTCP, 0)


def mptcp_connection(io: Io, client_protocol: int, listener_protocol: int) -> None:
    try:
        listener = socket.socket(proto=listener_protocol)
        client = socket.socket(proto=client_protocol)
    except OSError as error:
        io.log("MPTCP", errno.errorcode[error.errno or 0])
        return
    listener.bind((SERVER_IP, 0))
    listener.listen()
    client.bind((CLIENT_IP, 0))
    client.connect(listener.getsockname())
    server, _ = listener.accept()
    io.greeted(client, server)
    sender, receiver = io.directed(client, server)
    for number in range(20):
        sender.sendall(b"%d," % number * 100)
    sender.shutdown(socket.SHUT_WR)
    io.log("received", to_end(receiver))
    receiver.sendall(b"reply")
    receiver.close()
    io.log("reply", to_end(sender))
    listener.close()


@scenario(bypassed=None)
def fast_open(io: Io) -> None:
    """TCP Fast Open: data in the SYN, and more after it"""
    listener = io.listener(TCP_FASTOPEN=16)
    received = []
    for _ in range(3):  # the first connection only fetches the cookie
        client = socket.socket()
        client.bind((CLIENT_IP, 0))
        accepted = Background(listener.accept)
        early = b"in the SYN, "
        sent = attempt(client.sendto, early, MSG_FASTOPEN, listener.getsockname())
        server, _ = accepted.result()
        # Without a cookie an event loop is told EINPROGRESS, and sends when it is connected.
        client.sendall(early * (sent == "EINPROGRESS") + b"after it")
        client.shutdown(socket.SHUT_WR)
        received.append(to_end(server))
        server.sendall(b"reply")
        server.close()
        received.append(to_end(client))
        client.close()
    io.log("received", received)


@scenario(bypassed=False)
def connected_to_itself(io: Io) -> None:
    """A socket that connects to its own address (simultaneous open)"""
    with socket.socket() as own:
        own.bind((SERVER_IP, 0))
        own.connect(own.getsockname())
        own.sendall(b"echo")
        io.log("received", own.recv(100))
        own.shutdown(socket.SHUT_WR)
        io.log("end", to_end(own))


@scenario()
def ipv6(io: Io) -> None:
    """A connection over IPv6 loopback"""
    listener = socket.socket(socket.AF_INET6)
    if isinstance(attempt(listener.bind, ("::1", 0)), str):
        io.log("IPv6", "no loopback address")
        return
    listener.listen()
    exchange(io, listener, socket.socket(socket.AF_INET6))


@scenario()
def ipv4_to_ipv6_listener(io: Io) -> None:
    """An IPv4 client to an IPv6 listener (mapped addresses)"""
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    if isinstance(attempt(listener.bind, ("::", 0)), str):
        io.log("IPv6", "not on this machine")
        return
    listener.listen()
    client = socket.socket()
    client.bind((CLIENT_IP, 0))
    exchange(io, listener, client, (SERVER_IP, listener.getsockname()[1]))


def exchange(
    io: Io, listener: socket.socket, client: socket.socket, target: tuple[str, int] | None = None
) -> None:
    """Data and its end in the scenario's direction, over a connection to the listener."""
    client.connect(target or listener.getsockname())
    server, _ = listener.accept()
    io.greeted(client, server)
    sender, receiver = io.directed(client, server)
    for number in range(20):
        sender.sendall(b"%d," % number)
    sender.close()
    io.log("received", to_end(receiver))
    listener.close()


@scenario()
def same_port_twice(io: Io) -> None:
    """One client port towards two listeners at once: no byte reaches the wrong one"""
    clients, servers = [], []
    port = 0
    for _ in range(2):
        listener = io.listener()
        client = socket.socket()
        configure(client, {"SO_REUSEADDR": 1})
        client.bind((CLIENT_IP, port))
        client.connect(listener.getsockname())
        port = client.getsockname()[1]
        clients.append(client)
        servers.append(listener.accept()[0])
    for client, server in zip(clients, servers):
        io.greeted(client, server)
    for index, (client, server) in enumerate(zip(clients, servers)):
        client.sendall(b"to %d" % index)
        server.sendall(b"from %d" % index)
    io.log("servers", [server.recv(100) for server in servers])
    io.log("clients", [client.recv(100) for client in clients])


@scenario()
def connections_set_up_together(io: Io) -> None:
    """Fifty connections made before the first byte of any: no byte reaches the wrong one"""
    listener = io.listener()
    clients = []
    for _ in range(50):
        client = socket.socket()
        client.bind((CLIENT_IP, 0))
        client.connect(listener.getsockname())
        clients.append(client)
    servers = {}
    for _ in clients:
        server, peer = listener.accept()
        servers[peer] = server
    set_nodelay(*clients, *servers.values())
    wrong = 0
    for repeat in range(ACQUAINTANCE + 2):
        for client in clients:
            client.sendall(b"%d" % client.getsockname()[1])
        for client in clients:
            server = servers[client.getsockname()]
            text = b"%d" % client.getsockname()[1]
            wrong += exactly(server, len(text)) != text
            server.sendall(text)
            wrong += exactly(client, len(text)) != text
        if repeat == ACQUAINTANCE - 1:
            io.join(connections=50)
    io.log("wrong", wrong)


@scenario()
def connect_refused(io: Io) -> None:
    """A port nobody listens on"""
    with socket.socket() as unused:
        unused.bind((SERVER_IP, 0))
        target = unused.getsockname()
    with socket.socket() as client:
        client.bind((CLIENT_IP, 0))
        io.log("connect", attempt(client.connect, target))
    sender, receiver = io.pair()
    sender.sendall(b"others are not harmed")
    io.log("received", receiver.recv(100))


@scenario()
def upper_layer_protocol(io: Io) -> None:
    """TCP_ULP "tls" on an established connection, before any key is set"""
    sender, receiver = io.pair()
    done = attempt(sender.setsockopt, socket.IPPROTO_TCP, OPTIONS["TCP_ULP"], b"tls")
    io.log("TCP_ULP", done)
    for number in range(5):
        sender.sendall(b"%d," % number)
        receiver.sendall(b"ok")
        io.log(f"answer {number}", exactly(sender, 2))
    sender.close()
    io.log("received", to_end(receiver))


@scenario()
def accepted_by_epoll_and_poll(io: Io) -> None:
    """accept driven by epoll, then data on the accepted socket"""
    listener = io.listener()
    with select.epoll() as poller:
        poller.register(listener, select.EPOLLIN)
        client = socket.socket()
        client.bind((CLIENT_IP, 0))
        client.connect(listener.getsockname())
        io.log("listener readable", len(poller.poll(PATIENCE_S)))
        server, _ = listener.accept()
        io.greeted(client, server)
        sender, receiver = io.directed(client, server)
        poller.register(receiver, select.EPOLLIN)
        sender.sendall(ctypes.string_at(b"data", 4))
        io.log("connection readable", len(poller.poll(PATIENCE_S)))
    io.log("received", receiver.recv(100))
