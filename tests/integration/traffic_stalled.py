# SPDX-License-Identifier: Apache-2.0
"""A program: many receivers that do not read, each with a sender that sends until it is stopped.

`traffic_stalled.py CONNECTIONS [CGROUP]` joins the cgroup, if one is given, and a network namespace
of its own, and prints one JSON object: bytes queued in all, pages of TCP memory taken, sends that
failed, and whether a connection opened before and one opened after still work.
"""

from __future__ import annotations

import json
import re
import resource
import socket
import sys
import time
from pathlib import Path

from install.program.probes import enter

# Least, initial and most bytes of a socket's buffers: with the usual 4 MB to send, a thousand
# stalled receivers use up the memory that a machine of 24 GB has for TCP.
BUFFERS = {"tcp_rmem": "4096 131072 2097152", "tcp_wmem": "4096 131072 524288"}
SOCKSTAT = Path("/proc/net/sockstat")
CHUNK = b"s" * 65536
JOIN_S = 0.2  # some passes
ACQUAINTANCE = 12  # exchanges after which both ends may join


def tcp_pages() -> int:
    """Pages of memory that TCP holds, on the whole machine."""
    found = re.search(r"^TCP:.* mem (\d+)", SOCKSTAT.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def pair(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    """A client's and a server's end, which know each other."""
    client = socket.create_connection(listener.getsockname(), source_address=("127.0.0.6", 0))
    server, _ = listener.accept()
    for end in (client, server):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(ACQUAINTANCE):
        exchange(client, server)
    return client, server


def exchange(client: socket.socket, server: socket.socket) -> bool:
    """Whether a message and an answer arrive."""
    for end in (client, server):
        end.settimeout(20)
    client.sendall(b"question")
    heard = server.recv(100) == b"question"
    server.sendall(b"answer")
    return heard and client.recv(100) == b"answer"


def fill(sender: socket.socket) -> tuple[int, str | None]:
    """Bytes sent until the sender would block, and the error that stopped it, if another."""
    sender.setblocking(False)
    sent = 0
    while True:
        try:
            sent += sender.send(CHUNK)
        except BlockingIOError:
            return sent, None
        except OSError as error:
            return sent, type(error).__name__


def main(connections: int, cgroup: Path | None) -> None:
    enter(cgroup)
    for name, sizes in BUFFERS.items():
        Path("/proc/sys/net/ipv4", name).write_text(sizes)
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * connections + 100,) * 2)
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        healthy = pair(listener)
        before = tcp_pages()
        stalled = [pair(listener) for _ in range(connections)]
        for _ in range(3):  # they join, and the first messages after that go by TCP
            time.sleep(JOIN_S)
            for ends in stalled:
                exchange(*ends)
        filled = [fill(client) for client, _ in stalled]
        pages = tcp_pages() - before
        works = exchange(*healthy), exchange(*pair(listener))
    errors = [error for _, error in filled if error]
    json.dump(
        {
            "queued": sum(sent for sent, _ in filled),
            "pages": pages,
            "errors": errors,
            "others work": works,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
