# SPDX-License-Identifier: Apache-2.0
"""Suite: kernel TLS, switched on in the middle of a connection that has been bypassed, as JSON.

From then on what an end says must be TLS records on the wire, and nothing may go past TCP: a
redirect would hand the plaintext to the peer.
"""

from __future__ import annotations

import json
import socket
import struct
import sys

from install.program.probes import connected
from tests.light import SERVER_IP, LightPod, accelerated, away_from_pods

SOL_TLS, TLS_TX, TLS_RX, TCP_ULP = 282, 1, 2, 31
TLS_1_2, AES_GCM_128 = 0x0303, 51
APPLICATION_DATA = b"\x17\x03\x03"  # how every record begins (RFC 5246, 6.2.1)
ROUNDS = 50


def keys(speaker: int) -> bytes:
    """struct tls12_crypto_info_aes_gcm_128 (linux/tls.h), the same at both ends."""
    iv, key, salt, sequence = b"i" * 8, bytes([speaker]) * 16, b"salt", bytes(8)
    return struct.pack("=HH8s16s4s8s", TLS_1_2, AES_GCM_128, iv, key, salt, sequence)


def switch_on(sock: socket.socket, speaks: int | None, hears: int | None) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
    if speaks is not None:
        sock.setsockopt(SOL_TLS, TLS_TX, keys(speaks))
    if hears is not None:
        sock.setsockopt(SOL_TLS, TLS_RX, keys(hears))


def is_supported() -> bool:
    """Outside of every accelerated cgroup."""
    with (
        socket.create_server((SERVER_IP, 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0],
    ):
        try:
            switch_on(client, 0, 1)
        except OSError:
            return False
    return True


def receive(sock: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size and (part := sock.recv(size - len(received))):
        received += part
    return received


def wrong_rounds(client: socket.socket, server: socket.socket) -> int:
    """How many of ROUNDS messages, there and back, came out other than they went in."""
    wrong = 0
    for number in range(ROUNDS):
        message = bytes([number]) * (1 + 97 * number)
        client.sendall(message)
        wrong += receive(server, len(message)) != message
        server.sendall(message)
        wrong += receive(client, len(message)) != message
    return wrong


def try_it(pod: LightPod) -> dict[str, object]:
    """A kernel may refuse: then the application encrypts by itself, and the bytes stay right."""
    pod.enter()
    try:
        with connected(greet=False) as (client, server):
            wrong = wrong_rounds(client, server)
            try:
                switch_on(client, 0, 1)
            except OSError as error:
                wrong += wrong_rounds(client, server)
                return {"wrong": wrong, "refused": error.strerror}
            switch_on(server, 1, 0)
            wrong += wrong_rounds(client, server)
        with connected(greet=False) as (client, server):
            wrong += wrong_rounds(client, server)
            switch_on(client, 0, None)
            client.sendall(b"secret")
            encrypted = server.recv(100).startswith(APPLICATION_DATA)
        return {"wrong": wrong, "encrypted": encrypted}
    finally:
        away_from_pods()


def main() -> int:
    if not is_supported():
        json.dump({"supported": False}, sys.stdout)
        return 0
    with accelerated() as pod:
        found = try_it(pod)
        total = pod.total()
    reasons = total.tcp_messages.get("ineligible", 0)
    bypassed = total.bypassed_messages
    json.dump({"supported": True, **found, "bypassed": bypassed, "ineligible": reasons}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
