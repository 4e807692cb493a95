# SPDX-License-Identifier: Apache-2.0
"""`/startupz`, `/healthz`, `/readyz` and `/metrics`, on one small server.

One thread sleeps in accept; a request gets a thread for as long as it takes. Of more than
MAX_CONNECTIONS at once the oldest gives way, so that no number of clients that connect and stay
silent can keep a kubelet's probe out, or make threads without end.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST

from install.program import log

if TYPE_CHECKING:
    from install.program.agent.metrics import Metrics

MAX_CONNECTIONS = 8
TIMEOUT_S = 10.0  # a client that neither sends nor reads for so long is gone
# /startupz answers when the start is over: a probe that is answered "not yet" is a Warning event.
# A little less than the manifest's timeoutSeconds of the startupProbe.
START_PATIENCE_S = 290.0


class Health:
    """What the agent says of itself: whether it lives, and why the node is not ready."""

    def __init__(self, silence_s: float = 120.0) -> None:
        """Without a beat for `silence_s` seconds the agent counts as hung."""
        self._silence_s = silence_s
        self._beat = time.monotonic()
        self._reasons: tuple[str, ...] = ("starting",)
        self._started = threading.Event()
        # What an operator should know of a node that is as it should be; asked for each answer.
        self.remarks: Callable[[], Sequence[str]] = tuple

    def beat(self) -> None:
        """The agent's loop has come round."""
        self._beat = time.monotonic()

    def set_ready(self, reasons: Sequence[str]) -> None:
        """Ready when there is no reason why not."""
        self._reasons = tuple(reasons)

    def set_started(self) -> None:
        """The agent has tried everything once, or knows that it has to wait for another agent."""
        self._started.set()

    def why_not_started(self, patience_s: float) -> list[str]:
        """Waits for the start to be over, `patience_s` seconds at most; why it is not."""
        return [] if self._started.wait(patience_s) else list(self._reasons)

    def why_not_alive(self) -> list[str]:
        """Why the agent should be started again; empty when it should not."""
        silent_s = time.monotonic() - self._beat
        if silent_s <= self._silence_s:
            return []
        return [f"the agent's loop has not come round for {silent_s:.0f} s"]

    def why_not_ready(self) -> list[str]:
        """Why pods that start now are not accelerated as they should be; empty when they are."""
        return [*self.why_not_alive(), *self._reasons]


class Server:
    """The server, running; close() ends it."""

    def __init__(self, address: tuple[str, int], metrics: Metrics, health: Health) -> None:
        self._http = _HttpServer(address, metrics, health)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="http", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that are bound."""
        host, port = self._http.socket.getsockname()[:2]
        return host, port

    def _serve(self) -> None:
        # serve_forever() would look twice a second whether it is to end.
        while not self._closing.is_set():
            self._http.handle_request()

    def close(self) -> None:
        """No request is served any more; those under way are cut off."""
        self._closing.set()
        with contextlib.suppress(OSError):
            self._http.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._http.server_close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(address: str, metrics: Metrics, health: Health) -> Server:
    """Serve at "HOST:PORT", "[IPv6]:PORT", or ":PORT" for all addresses of the node.

    Raises ValueError for an address that is none, OSError when it cannot be bound.
    """
    try:
        return Server(parse_address(address), metrics, health)
    except OSError as error:
        raise OSError(error.errno, error.strerror, address) from error


def parse_address(text: str) -> tuple[str, int]:
    """Host and port; raises ValueError that says what was expected."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError(f"{text!r} is no HOST:PORT: {error}") from error
    if port is None or parts.netloc != text or parts.username is not None:
        raise ValueError(f"{text!r} is no HOST:PORT, [IPv6]:PORT or :PORT")
    return host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0"), port


class _HttpServer(ThreadingHTTPServer):
    """Its threads are daemons: whoever is being served does not hold up the agent's end."""

    request_queue_size = 64

    def __init__(self, address: tuple[str, int], metrics: Metrics, health: Health) -> None:
        self.metrics = metrics
        self.health = health
        self._open: deque[socket.socket] = deque()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)  # HTTPServer's asks the DNS for our own name

    def get_request(self) -> Any:
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)  # out of descriptors: it would fail again at once, and again
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        while len(self._open) >= MAX_CONNECTIONS:
            with contextlib.suppress(OSError, IndexError):
                self._open.popleft().shutdown(socket.SHUT_RDWR)  # ends its thread
        self._open.append(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(ValueError):  # it gave way
            self._open.remove(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, *_: Any) -> None:
        failed = sys.exc_info()[1]
        if not isinstance(failed, OSError):  # a client that goes away before its answer is no news
            log.error("request_failed", f"a request could not be answered: {failed!r}")


class _Handler(BaseHTTPRequestHandler):
    """One request, one answer, connection closed."""

    server: _HttpServer
    timeout = TIMEOUT_S
    server_version = "tcpip-bypass"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/startupz":
            self._answer_why_not(self.server.health.why_not_started(START_PATIENCE_S))
        elif path == "/healthz":
            self._answer_why_not(self.server.health.why_not_alive())
        elif path == "/readyz":
            reasons = self.server.health.why_not_ready()
            self._answer_why_not(reasons, () if reasons else self.server.health.remarks())
        elif path == "/metrics":
            self._answer(HTTPStatus.OK, self.server.metrics.render(), CONTENT_TYPE_LATEST)
        else:
            self._answer(HTTPStatus.NOT_FOUND, b"/startupz, /healthz, /readyz or /metrics\n")

    do_HEAD = do_GET

    def _answer_why_not(self, reasons: list[str], remarks: Sequence[str] = ()) -> None:
        status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
        lines = reasons or ["ok", *remarks]
        self._answer(status, "".join(f"{line}\n" for line in lines).encode())

    def _answer(
        self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8"
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Probes come every few seconds: a line each would bury the events."""
