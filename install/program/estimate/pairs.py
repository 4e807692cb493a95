# SPDX-License-Identifier: Apache-2.0
"""Which two sockets are one connection, on which hop, and whether it could bypass.

From outside there are no sequence numbers to pair by. So a server's end, which is one whose local
port is listened on, looks for the client that has the address which the server sees as its peer:
in its own namespace first (REDIRECT, 127.0.0.6, TPROXY), else in the pod that owns the address.
Where several fit, the numbers of bytes decide.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bpf.loader import Limits
from install.program.estimate.pods import Pod
from install.program.estimate.sockets import Address, Buffers, Dump, Socket

_ULPS = {"mptcp": "MPTCP", "tls": "kernel TLS"}


@dataclass(frozen=True)
class End:
    """One end of a connection."""

    pod: Pod
    socket: Socket
    is_proxy: bool


@dataclass(frozen=True)
class Connection:
    """A connection of which at least one end is in a pod of this node."""

    client: End | None  # None: it is elsewhere
    server: End | None
    hop: str  # of bpf/abi.py: "none" when one end is elsewhere

    @property
    def ends(self) -> list[End]:
        return [each for each in (self.client, self.server) if each]

    @property
    def is_between_pods(self) -> bool:
        """Whether it leaves its pod, for another one or for somewhere else."""
        return not (self.client and self.server and self.client.pod == self.server.pod)

    @property
    def may_be_to_a_sidecar(self) -> bool:
        """Whether a sidecar has made it out of its pod, and no end here is without a sidecar."""
        by_proxy = self.client is not None and self.client.is_proxy
        return by_proxy and self.is_between_pods and self.hop != "direct"


def pair(dumps: Mapping[Pod, Dump]) -> list[Connection]:
    """Every established connection of these pods."""
    clients: dict[tuple[str, Address], list[End]] = defaultdict(list)  # by namespace and address
    servers: list[End] = []
    for pod, found in dumps.items():
        ports = {each.local[1] for each in found.sockets if each.is_listener}
        for socket in found.sockets:
            if socket.is_listener:
                continue
            end = End(pod, socket, socket.uid == pod.proxy_uid)
            if socket.local[1] in ports:
                servers.append(end)
            else:
                clients[pod.netns, socket.local].append(end)
    owners = {ip: pod.netns for pod in dumps for ip in pod.ips}
    connections = []
    for server in servers:
        client = _client_of(server, clients, owners)
        connections.append(Connection(client, server, _hop(client, server)))
    left = [Connection(end, None, "none") for ends in clients.values() for end in ends]
    return connections + left


def _client_of(
    server: End, clients: dict[tuple[str, Address], list[End]], owners: Mapping[str, str]
) -> End | None:
    """Takes the client that fits best out of those that are left."""
    peer = server.socket.peer
    for namespace in (server.pod.netns, owners.get(peer[0])):
        candidates = clients.get((namespace, peer), []) if namespace else []
        if candidates:
            best = min(candidates, key=lambda each: _distance(each.socket, server.socket))
            candidates.remove(best)
            return best
    return None


def _distance(client: Socket, server: Socket) -> tuple[bool, int]:
    mirrored = client.peer == server.local
    missing = abs(client.sent - server.received) + abs(server.sent - client.received)
    return not mirrored, missing


def _hop(client: End | None, server: End | None) -> str:
    """As tb_hop() of bpf/data_path."""
    if client is None or server is None:
        return "none"
    if client.pod != server.pod:
        return "sidecars" if client.is_proxy and server.is_proxy else "direct"
    if client.is_proxy == server.is_proxy:
        return "local"
    return "inbound" if client.is_proxy else "outbound"


class Judge:
    """Says why a connection would stay on TCP."""

    def __init__(
        self, buffers: Mapping[Pod, Buffers], listeners: Iterable[End], blocking: Mapping[int, bool]
    ) -> None:
        """`listeners` are the pods' listening sockets; `blocking` is by the sockets' inodes."""
        self._buffers, self._blocking = buffers, blocking
        self._listeners = {(each.pod.netns, each.socket.local[1]): each for each in listeners}

    def reason(self, connection: Connection) -> str:
        """Empty when it could bypass."""
        if connection.client is None or connection.server is None:
            return "the other end is not on this node"
        return (
            next(filter(None, map(_of_pod, connection.ends)), "")
            or _of_addresses(connection)
            or _of_age(connection.client.socket)
            or next(filter(None, map(self._of_socket, connection.ends)), "")
        )

    def _of_socket(self, end: End) -> str:
        socket = end.socket
        listener = self._listeners.get((end.pod.netns, socket.local[1]))
        if socket.ulp:  # one accepted by an MPTCP listener from a plain TCP client has none
            return _ULPS.get(socket.ulp, f"ULP {socket.ulp}")
        if self._has_set_rcvbuf(end, listener):
            return "SO_RCVBUF"
        if self._blocking.get(socket.inode):
            return "blocking reader"
        return ""

    def _has_set_rcvbuf(self, end: End, listener: End | None) -> bool:
        """As far as it shows: below what it begins with, at what can be set, or of its listener."""
        buffers, rcvbuf = self._buffers[end.pod], end.socket.rcvbuf
        if not rcvbuf or not buffers.first:
            return False
        if listener and listener.socket.rcvbuf not in (0, buffers.first):
            return True
        return rcvbuf < buffers.first or rcvbuf == buffers.settable != buffers.first


def _of_pod(end: End) -> str:
    if end.pod.plan is None:
        return f"not accelerated: {end.pod.reason}"
    return "the pod is proxy-only" if end.pod.plan.proxy_only and not end.is_proxy else ""


def _of_addresses(connection: Connection) -> str:
    if _has_excluded_port(connection):
        return "excluded port"
    if _is_translated(connection):
        return "a ClusterIP between a pod with and one without a sidecar"
    return ""


def _of_age(socket: Socket) -> str:
    """A socket joins late: docs/architecture.md. An exchange takes a segment each way at least."""
    most = min(socket.segments, socket.segments_received)
    wanted = Limits().before_joining
    return f"fewer than {wanted} exchanges so far" if most < wanted else ""


def _has_excluded_port(connection: Connection) -> bool:
    ports = {port for end in connection.ends for _, port in (end.socket.local, end.socket.peer)}
    return any(
        first <= port <= last
        for end in connection.ends
        if end.pod.plan
        for first, last in end.pod.plan.excluded_ports
        for port in ports
    )


def _is_translated(connection: Connection) -> bool:
    assert connection.client
    assert connection.server
    one, other = connection.client.pod, connection.server.pod
    dialled = connection.client.socket.peer[0]
    return one != other and one.in_mesh != other.in_mesh and dialled not in other.ips
