# SPDX-License-Identifier: Apache-2.0
"""What the self-test tries on a kernel: one small behaviour of a connection each.

Every probe opens connections of its own on loopback and returns what it found. The self-test
runs all of them twice in a child process, over plain TCP and inside an accelerated cgroup, and
compares; so a probe must not say anything that differs from run to run.

Run as `python -m install.program.probes [CGROUP]`: joins the cgroup, if one is given, and a network
namespace of its own, and prints one JSON object: probe name -> what it found.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
IPPROTO_MPTCP = 262
TIMEOUT_S = 5.0
ORDER_CONNECTIONS = 5
GREETINGS = 16
GREETING_S = 0.006  # longer than it is from one pass of the self-test to the next
STALL_LIMIT = 64 * 2**20
PART = 4096  # bytes that an edge-triggered reader asks for
ADDRESSES = {socket.AF_INET: ("127.0.0.6", "127.0.0.1"), socket.AF_INET6: ("::1", "::1")}

Found = dict[str, object]


@contextmanager
def connected(
    family: socket.AddressFamily = socket.AF_INET,
    *,
    defer_accept: bool = False,
    greet: bool = True,
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(client, server) from 127.0.0.6, as Envoy connects to its application; or over IPv6.

    They have TCP_NODELAY and their files are non-blocking, as an event loop's are. With `greet`,
    bytes have gone each way for long enough that both ends have joined.
    """
    source, target = ADDRESSES[family]
    with socket.create_server((target, 0), family=family) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if defer_accept:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        with socket.socket(family) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.settimeout(TIMEOUT_S)
            client.bind((source, 0))
            client.connect(listener.getsockname())
            if defer_accept:
                client.sendall(b"0")
            server, _ = listener.accept()
            with server:
                server.settimeout(TIMEOUT_S)
                if defer_accept:
                    server.recv(1)
                if greet:
                    _greet(client, server)
                yield client, server


def _greet(client: socket.socket, server: socket.socket) -> None:
    for _ in range(GREETINGS):
        client.sendall(b"a")
        server.recv(1)
        server.sendall(b"b")
        client.recv(1)
        time.sleep(GREETING_S)


def read_to_end(sock: socket.socket) -> bytes:
    """Everything until the peer's FIN."""
    received = []
    while chunk := sock.recv(65536):
        received.append(chunk)
    return b"".join(received)


def unread_bytes(sock: socket.socket) -> int:
    """ioctl(FIONREAD)."""
    value = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, value)
    return value[0]


def order() -> Found:
    """Pipelined writes to a listener with TCP_DEFER_ACCEPT, the first of them by TCP."""
    corrupted = 0
    for _ in range(ORDER_CONNECTIONS):
        with connected(defer_accept=True) as (client, server):
            for digit in b"123456789":
                client.sendall(bytes([digit]))
            client.shutdown(socket.SHUT_WR)
            corrupted += read_to_end(server) != b"123456789"
    return {"corrupted connections": corrupted}


def backpressure() -> Found:
    """How much a sender can queue on a receiver that does not read, and that all of it arrives."""
    with connected() as (client, server):
        client.setblocking(False)
        sent = 0
        try:
            while sent < STALL_LIMIT:
                sent += client.send(b"s" * 65536)
        except OSError as error:
            stopped_by = error.__class__.__name__
        else:
            stopped_by = "nothing"
        client.shutdown(socket.SHUT_WR)
        received = len(read_to_end(server))
    return {"queued": sent, "stopped by": stopped_by, "lost": sent - received}


def heard_by_edges(edges: select.epoll, reader: socket.socket, size: int) -> int:
    """Reads so many bytes, edge-triggered; a short read is taken for the end of what is there, as
    epoll(7) allows. Returns how many bytes it has heard, fewer when no event comes in time."""
    count = 0
    while count < size and edges.poll(TIMEOUT_S):
        got = PART
        with contextlib.suppress(BlockingIOError):
            while got == PART:
                got = len(reader.recv(PART))
                count += got
    return count


def edge_behind() -> Found:
    """An edge-triggered reader that rested hears of all, a short read being the end to it."""
    with connected() as (client, server), select.epoll() as edges:
        edges.register(server, select.EPOLLIN | select.EPOLLET)
        for each in (client, server):
            each.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < STALL_LIMIT:
                sent += client.send(b"s" * 65000)  # no multiple of PART
        heard = heard_by_edges(edges, server, sent)
    return {"heard": "all" if heard == sent else f"{heard} of {sent} bytes"}


def fionread_bypassed() -> Found:
    """FIONREAD for bytes that came by bypass."""
    with connected() as (client, server):
        client.sendall(b"x" * 1000)
        return {"FIONREAD": unread_bytes(server)}


def fionread_tcp() -> Found:
    """FIONREAD for bytes that came by TCP to a socket in the sockhash."""
    with connected() as (client, server):
        _send_by_tcp(server, b"x" * 1000)
        select.select([client], [], [], TIMEOUT_S)
        return {"FIONREAD": unread_bytes(client)}


def fionread_ipv6() -> Found:
    """FIONREAD over IPv6, for bytes that came either way."""
    try:
        with socket.create_server((ADDRESSES[socket.AF_INET6][1], 0), family=socket.AF_INET6):
            pass
    except OSError:
        return {"FIONREAD": "no IPv6"}
    with connected(socket.AF_INET6) as (client, server):
        _send_by_tcp(server, b"x" * 1000)
        client.sendall(b"x" * 500)
        select.select([client], [], [], TIMEOUT_S)
        return {"FIONREAD": unread_bytes(client), "the other end": unread_bytes(server)}


def splice() -> Found:
    """A reader that turns to splice(2), or goes on with recv(2) where that is refused."""
    with connected() as (client, server):
        client.sendall(b"x" * 1000)
        select.select([server], [], [], TIMEOUT_S)
        ends = os.pipe()
        try:
            moved = os.splice(server.fileno(), ends[1], 1000)
        except BlockingIOError:
            moved = 0
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            moved = len(server.recv(1000))
        finally:
            for end in ends:
                os.close(end)
    return {"bytes": moved}


def _send_by_tcp(sock: socket.socket, data: bytes) -> None:
    """As when the bypass is paused: what is corked goes by TCP."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    sock.sendall(data)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)


def half_close() -> Found:
    """A reply after the client has shut down its sending side."""
    with connected() as (client, server):
        client.sendall(b"request")
        client.shutdown(socket.SHUT_WR)
        request = read_to_end(server)
        server.sendall(b"reply")
        server.close()
        return {"request": request.decode(), "reply": read_to_end(client).decode()}


def close_after_data() -> Found:
    """Data followed at once by close arrives whole, then end of file."""
    with connected() as (client, server):
        client.sendall(b"x" * 30000)
        client.close()
        return {"received": len(read_to_end(server))}


def epoll(flags: int) -> Found:
    """Wake-ups of a waiting epoll, for each of three messages that are read one by one; the second
    comes by TCP."""
    woken = []
    with connected() as (client, server), select.epoll() as poller:
        poller.register(server, select.EPOLLIN | flags)
        for send in (socket.socket.sendall, _send_by_tcp, socket.socket.sendall):
            send(client, b"x" * 10)
            woken.append(len(poller.poll(TIMEOUT_S)))
            server.recv(100)
        woken.append(len(poller.poll(0.05)))
    return {"events": woken}


def level_triggered() -> Found:
    """epoll, level-triggered, also for bytes that come by TCP."""
    return epoll(0)


def edge_triggered() -> Found:
    """epoll, edge-triggered, also for bytes that come by TCP."""
    return epoll(select.EPOLLET)


def blocking() -> Found:
    """A reader that blocks in recv while another thread sends on the same socket."""
    failed: list[str] = []
    with connected(greet=False) as (client, server):
        for each in (client, server):
            each.settimeout(None)
            timeout = struct.pack("ll", int(TIMEOUT_S), 0)  # its file stays blocking
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)
        sides = [
            threading.Thread(target=work)
            for work in (partial(_echo, server, failed), partial(_drain, client, failed))
        ]
        for side in sides:
            side.start()
        for _ in range(2 * GREETINGS):
            client.sendall(b"x" * PART)
            time.sleep(GREETING_S)
        client.shutdown(socket.SHUT_WR)
        for side in sides:
            side.join()
    return {"errors": failed}


def _echo(sock: socket.socket, failed: list[str]) -> None:
    try:
        while data := sock.recv(PART):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError as error:
        failed.append(error.__class__.__name__)


def _drain(sock: socket.socket, failed: list[str]) -> None:
    try:
        while sock.recv(PART):
            pass
    except OSError as error:
        failed.append(error.__class__.__name__)


def mptcp_fallback() -> Found:
    """A plain TCP client of an MPTCP listener, as each Go server is one."""
    try:
        listener = socket.socket(proto=IPPROTO_MPTCP)
    except OSError:
        return {"received": "no MPTCP"}
    with listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.settimeout(TIMEOUT_S)
        client.bind(("127.0.0.6", 0))
        client.connect(listener.getsockname())
        server, _ = listener.accept()
        with server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.settimeout(TIMEOUT_S)
            _greet(client, server)
            client.sendall(b"x" * 1000)
            client.shutdown(socket.SHUT_WR)
            return {"received": len(read_to_end(server))}


PROBES: dict[str, Callable[[], Found]] = {
    probe.__name__: probe
    for probe in (
        order,
        backpressure,
        half_close,
        close_after_data,
        level_triggered,
        edge_triggered,
        edge_behind,
        fionread_bypassed,
        fionread_tcp,
        fionread_ipv6,
        splice,
        blocking,
        mptcp_fallback,
    )
}


def enter(cgroup: Path | None) -> None:
    """Joins the cgroup and a new network namespace whose loopback is up; ends with its parent."""
    from pyroute2 import IPRoute  # noqa: PLC0415 - 18 MB, and the node program lists the probes

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
    with IPRoute() as ip:
        ip.link("set", index=1, state="up")
    if cgroup:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def main() -> None:
    """Runs all probes, or only those named, and prints what they found."""
    cgroup = sys.argv[1] if len(sys.argv) > 1 else ""
    enter(Path(cgroup) if cgroup else None)
    found = {}
    for name in sys.argv[2:] or PROBES:
        try:
            found[name] = PROBES[name]()
        except OSError as error:
            found[name] = {"failed": f"{error.__class__.__name__}: {error}"}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
