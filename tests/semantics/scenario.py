# SPDX-License-Identifier: Apache-2.0
"""What a scenario is, and what it works with."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Union

from tests.light import ACQUAINTANCE, CLIENT_IP, SERVER_IP, set_nodelay

# Long enough for whatever is under way on loopback to have arrived. A slow virtual machine sets
# the variable.
SETTLE_S: Final = float(os.environ.get("TB_SETTLE_S", "0.05"))
PATIENCE_S: Final = 100 * SETTLE_S
# The time-out of an event loop's sockets: longer than any scenario may take.
LONG_S: Final = 1000.0

libc = ctypes.CDLL(None, use_errno=True)

Value = Union[str, int, bool, None, list[Any]]


@dataclass(frozen=True)
class Limit:
    """A difference that is known: what it means for an application, and what to do about it."""

    means: str
    do: str
    everywhere: bool = True  # False: on some kernels only


@dataclass(frozen=True)
class Scenario:
    """One behaviour. `bypassed`: between event loops bytes go by bypass in it, never do, or (None)
    it depends. `limit`: in what it differs between event loops; blocking ends never differ."""

    name: str
    title: str
    run: Callable[[Io], None]
    limit: Limit | None
    bypassed: bool | None


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    limit: Limit | None = None, *, bypassed: bool | None = True
) -> Callable[[Callable[[Io], None]], Callable[[Io], None]]:
    """Registers a function as a scenario; its docstring is the title in the table."""

    def register(run: Callable[[Io], None]) -> Callable[[Io], None]:
        title = (run.__doc__ or run.__name__).strip().rstrip(".")
        SCENARIOS[run.__name__] = Scenario(run.__name__, title, run, limit, bypassed)
        return run

    return register


Pair = tuple[socket.socket, socket.socket]


class Io:
    """A scenario's connections, in one of the two directions, and its log.

    `until_joined` waits, where sockets shall join, until so many of this scenario's have.
    """

    def __init__(
        self,
        *,
        upstream: bool,
        emit: Callable[[str, Value], None],
        until_joined: Callable[[int], None] | None = None,
    ) -> None:
        self.upstream = upstream  # the client sends
        self._emit = emit
        self._until_joined = until_joined
        self._joined = 0
        self._keep: list[socket.socket] = []

    def log(self, event: str, value: object) -> None:
        """Adds to the transcript; nothing that varies from run to run may go in."""
        self._emit(event, shown(value))

    def listener(self, **options: int) -> socket.socket:
        """A listening socket; options are names of TCP_* and SO_* constants."""
        made = socket.socket()
        configure(made, options)
        made.bind((SERVER_IP, 0))
        made.listen()
        self._keep.append(made)
        return made

    def pair(
        self, *, greet: bool = True, both: dict[str, int] | None = None, client_first: bytes = b""
    ) -> Pair:
        """(sender, receiver) of a new connection.

        With `greet`, bytes have gone each way, the last by bypass where that is on. `both` are
        options that both ends have before they connect; `client_first` is sent before the server
        accepts.
        """
        listener = self.listener(**(both or {}))
        client = socket.socket()
        configure(client, both or {})
        client.bind((CLIENT_IP, 0))
        client.connect(listener.getsockname())
        if client_first:
            client.sendall(client_first)
        server, _ = listener.accept()
        if greet:
            self.greeted(client, server)
        return self.directed(client, server)

    def greeted(self, client: socket.socket, server: socket.socket) -> None:
        """Bytes go both ways, both ends join where they shall, and bytes go both ways again."""
        exchanged(client, server, ACQUAINTANCE)
        self.join()
        exchanged(client, server)

    def join(self, connections: int = 1) -> None:
        """Waits until both ends of so many more connections have joined, where they shall."""
        self._joined += 2 * connections
        if self._until_joined:
            self._until_joined(self._joined)

    def directed(self, client: socket.socket, server: socket.socket) -> Pair:
        """The two ends as (sender, receiver)."""
        self._keep += [client, server]
        return (client, server) if self.upstream else (server, client)


def exchanged(client: socket.socket, server: socket.socket, times: int = 2) -> None:
    """Sends so many bytes each way, each end having read everything before it sends."""
    set_nodelay(client, server)  # one end must have it, or none joins
    for _ in range(times):
        client.sendall(b"c")
        exactly(server, 1)
        server.sendall(b"s")
        exactly(client, 1)


def as_before(sock: socket.socket) -> None:
    """After setblocking(False): blocking again, or an event loop's."""
    sock.settimeout(socket.getdefaulttimeout())


def configure(sock: socket.socket, options: dict[str, int]) -> None:
    """Sets options by name, e.g. {"TCP_NODELAY": 1}."""
    for name, value in options.items():
        level = socket.IPPROTO_TCP if name.startswith("TCP_") else socket.SOL_SOCKET
        sock.setsockopt(level, OPTIONS.get(name) or getattr(socket, name), value)


# What Python's socket module does not name (include/uapi/linux/tcp.h, asm-generic/socket.h).
OPTIONS: Final = {
    "SO_ATTACH_FILTER": 26,
    "SO_DETACH_FILTER": 27,
    "SO_ZEROCOPY": 60,
    "SO_PEEK_OFF": 42,
    "SO_TIMESTAMPNS": 35,
    "SO_TIMESTAMPING": 37,
    "TCP_INQ": 36,
    "TCP_ZEROCOPY_RECEIVE": 35,
    "TCP_FASTOPEN_CONNECT": 30,
    "TCP_ULP": 31,
}


def shown(value: object) -> Value:
    """A value as it stands in a transcript: bytes in full when few, else length and digest."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        if len(data) <= 32:
            return data.decode("latin-1")
        return f"{len(data)} bytes, sha1 {hashlib.sha1(data).hexdigest()[:8]}"
    if isinstance(value, (list, tuple)):
        return [shown(item) for item in value]
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"{value!r} cannot stand in a transcript")


def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns, or the name of the errno it failed with."""
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno or 0] if error.errno else str(error)


def or_error(returned: int) -> int | str:
    """What a function of libc returned, or the name of the errno it failed with."""
    return returned if returned >= 0 else errno.errorcode[ctypes.get_errno()]


def recv(sock: socket.socket, size: int, flags: int = 0) -> bytes | str:
    """recv(2) as it is: Python's own answers for size 0, tries again after EINTR, and polls first
    for an event loop."""
    buffer = ctypes.create_string_buffer(max(size, 1))
    got = libc.recv(sock.fileno(), buffer, size, flags)
    return buffer.raw[:got] if got >= 0 else errno.errorcode[ctypes.get_errno()]


def awaited(sock: socket.socket, size: int, flags: int = 0) -> bytes | str:
    """The same, by an event loop once poll calls it readable."""
    if sock.gettimeout():
        readable(sock, LONG_S)
    return recv(sock, size, flags)


def exactly(sock: socket.socket, size: int) -> bytes:
    """Reads `size` bytes, or up to the end of the stream."""
    data = bytearray()
    while len(data) < size:
        chunk = sock.recv(min(size - len(data), 1 << 16))
        if not chunk:
            break
        data += chunk
    return bytes(data)


def exactly_by_poll(sock: socket.socket, size: int) -> bytes:
    """The same for a reader that asks poll before each recv, as every event loop does."""
    data = bytearray()
    while len(data) < size and readable(sock):
        chunk = recv(sock, min(size - len(data), 1 << 16), socket.MSG_DONTWAIT)
        if not chunk:
            break
        if isinstance(chunk, bytes):
            data += chunk
    return bytes(data)


def to_end(sock: socket.socket) -> list[object]:
    """Everything there is to read, and how it ends: "EOF" or the name of an errno."""
    data = bytearray()
    while True:
        chunk = attempt(sock.recv, 1 << 16)
        if not isinstance(chunk, bytes):
            return [bytes(data), chunk]
        if not chunk:
            return [bytes(data), "EOF"]
        data += chunk


def acquaint(ends: Pair, send: Callable[[], object], size: int) -> None:
    """Exchanges, in which the sender sends `size` bytes by `send`: they would join, if they may."""
    sender, receiver = ends
    for _ in range(20):
        send()
        exactly_by_poll(receiver, size)
        receiver.sendall(b"answer")
        exactly_by_poll(sender, 6)
        settle()


def pattern(size: int) -> bytes:
    """Bytes of which no two stretches are alike: what is lost or swapped shows in the digest."""
    return b"".join(hashlib.sha1(b"%d" % n).digest() for n in range(size // 20 + 1))[:size]


def message_headers(buffers: list[ctypes.Array[ctypes.c_char]]) -> ctypes.Array[ctypes.c_char]:
    """An array of struct mmsghdr, one for each buffer, for recvmmsg and sendmmsg."""
    headers = ctypes.create_string_buffer(64 * len(buffers))
    vectors = ctypes.create_string_buffer(16 * len(buffers))
    for number, buffer in enumerate(buffers):
        vector = ctypes.addressof(vectors) + 16 * number
        struct.pack_into("PN", vectors, 16 * number, ctypes.addressof(buffer), len(buffer))
        struct.pack_into("PIPN", headers, 64 * number, 0, 0, vector, 1)
    headers.vectors = vectors  # type: ignore[attr-defined]  # lives as long as the headers
    return headers


def settle() -> None:
    """Waits until whatever is under way has arrived."""
    time.sleep(SETTLE_S)


def readable(sock: socket.socket, timeout_s: float = PATIENCE_S) -> bool:
    """Waits for poll(2) to call it readable."""
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def poll_mask(sock: socket.socket, timeout_s: float = 0) -> str:
    """What poll(2) says of the socket, e.g. "IN|OUT"."""
    poller = select.poll()
    poller.register(sock, select.POLLIN | select.POLLPRI | select.POLLOUT | select.POLLRDHUP)
    return mask_names(dict(poller.poll(timeout_s * 1000)).get(sock.fileno(), 0))


def mask_names(mask: int) -> str:
    """A poll or epoll mask in words; the two have the same bits."""
    names = ("IN", "PRI", "OUT", "ERR", "HUP", "RDHUP")
    found = [name for name in names if mask & int(getattr(select, f"POLL{name}"))]
    return "|".join(found) or "nothing"


def abort(sock: socket.socket) -> None:
    """Closes with a RST (SO_LINGER 0)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Background:
    """A call in a thread of its own."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._result: Any = "still blocked"
        self._thread = threading.Thread(target=self._run, args=(call, *arguments), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._result = attempt(call, *arguments)

    def result(self, timeout_s: float = PATIENCE_S) -> Any:
        """What it returned, or "still blocked"."""
        self._thread.join(timeout_s)
        return self._result
