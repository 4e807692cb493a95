# SPDX-License-Identifier: Apache-2.0
"""A Kubernetes API server for one question, on loopback, with a certificate of its own."""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

NAMESPACE, NAME = "kube-system", "tcpip-bypass-node"
PATH = f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/{NAME}"
TOKEN = "a-token"

Answer = tuple[int, Any]  # HTTP status and JSON document

WANTED: Answer = (200, {"kind": "DaemonSet", "metadata": {"name": NAME}})
BEING_DELETED: Answer = (
    200,
    {
        "kind": "DaemonSet",
        "metadata": {"name": NAME, "deletionTimestamp": "2026-01-31T08:15:00Z"},
    },
)
GONE: Answer = (
    404,
    {
        "kind": "Status",
        "reason": "NotFound",
        "message": f'daemonsets.apps "{NAME}" not found',
        "details": {"name": NAME, "group": "apps", "kind": "daemonsets"},
    },
)
UNAUTHORIZED: Answer = (401, {"kind": "Status", "message": "Unauthorized"})
FORBIDDEN: Answer = (403, {"kind": "Status", "reason": "Forbidden", "message": "cannot get"})


@dataclass
class ApiServer:
    """What it answers, and what it was asked: (path, Authorization header)."""

    port: int
    certificate: Path
    answer: Answer = WANTED
    asked: list[tuple[str, str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """What the kubelet gives a pod."""
        return {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(self.port)}

    def write_service_account(self, folder: Path) -> None:
        """What the kubelet mounts into a pod."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "token").write_text(TOKEN)
        (folder / "ca.crt").write_bytes(self.certificate.read_bytes())


@contextmanager
def running(folder: Path) -> Iterator[ApiServer]:
    """Serves on 127.0.0.1 of the network namespace of this thread; its files are in folder."""
    certificate, key = folder / "server.crt", folder / "server.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=kubernetes"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.asked.append((self.path, self.headers.get("Authorization", "")))
            status, document = server.answer
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    http.socket = context.wrap_socket(http.socket, server_side=True)
    server = ApiServer(http.server_port, certificate)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
