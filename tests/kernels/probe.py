# SPDX-License-Identifier: Apache-2.0
"""Suite: do the programs load on this kernel at their real size, and do the bytes of the two hops
inside a pod go past TCP? Do TCP clients of MPTCP listeners join, and connections from before?"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized

from bpf.loader import TAKE_IN, LoadError, Programs
from cni_plugin import names
from install.program.passes import take_in
from install.program.probes import enter
from tests.light import CLIENT_IP, SERVER_IP, LightPod, accelerated, set_nodelay
from tests.passes import mptcp

APP_UID = 0
APP = (SERVER_IP, 8080)
SERVICE = (SERVER_IP, 80)
ENVOY = (SERVER_IP, 15001)
REDIRECT = "iptables -t nat -A OUTPUT -p tcp --dport 80 -j REDIRECT --to-ports 15001"

FORK = multiprocessing.get_context("fork")
ROUNDS = 200
MESSAGE = bytes(range(64))
TIMEOUT_S = 10
PATIENCE_S = 60  # for two sockets to join, on an emulated CPU


@contextmanager
def owned_by(uid: int) -> Iterator[None]:
    """Sockets made here belong to `uid`: 1337 is the sidecar, anybody else the application."""
    os.seteuid(uid)
    yield
    os.seteuid(0)


def ping_pong(pod: LightPod, client: socket.socket, server: socket.socket) -> None:
    """One message there and back, ROUNDS times after both ends have joined."""
    for end in (client, server):
        end.settimeout(TIMEOUT_S)
    wanted, deadline = pod.members() + 2, time.monotonic() + PATIENCE_S
    while pod.members() < wanted and time.monotonic() < deadline:
        go_round(client, server)
    for _ in range(ROUNDS):
        go_round(client, server)


def go_round(client: socket.socket, server: socket.socket) -> None:
    for sender, receiver in ((client, server), (server, client)):
        sender.sendall(MESSAGE)
        if receiver.recv(len(MESSAGE) + 1) != MESSAGE:
            raise SystemExit("a message came out other than it went in")


def inbound(pod: LightPod) -> None:
    """The sidecar calls its application from 127.0.0.6."""
    with owned_by(APP_UID):
        listener = socket.create_server(APP)
        set_nodelay(listener)
    with owned_by(names.PROXY_UID):
        client = socket.create_connection(APP, TIMEOUT_S, (CLIENT_IP, 0))
        set_nodelay(client)
    with listener, client, listener.accept()[0] as server:
        ping_pong(pod, client, server)


def outbound(pod: LightPod) -> None:
    """The application calls a service, and iptables leads it to the sidecar."""
    subprocess.run(REDIRECT.split(), check=True)
    with owned_by(names.PROXY_UID):
        listener = socket.create_server(ENVOY)
        set_nodelay(listener)
    with owned_by(APP_UID):
        client = socket.create_connection(SERVICE, TIMEOUT_S)
        set_nodelay(client)
    with owned_by(names.PROXY_UID):  # accept(2) makes the socket its caller's
        server, _ = listener.accept()
    with listener, client, server:
        ping_pong(pod, client, server)


def in_pod(pod: LightPod) -> None:
    enter(pod.folder)
    inbound(pod)
    outbound(pod)


def from_before(pod: LightPod, joined: Synchronized[int]) -> None:
    """A connection that is older than the pod's attachment: how many of its ends join?"""
    enter(pod.folder)
    pod.detach()
    with (
        socket.create_server(APP) as listener,
        socket.create_connection(APP, TIMEOUT_S, (CLIENT_IP, 0)) as client,
        listener.accept()[0] as server,
    ):
        set_nodelay(client, server)
        pod.attach()
        before = pod.members()
        if take_in(pod.programs.fds[TAKE_IN], pod.folder):
            ping_pong(pod, client, server)
        joined.value = pod.members() - before


def in_child(work: Callable[..., None], *arguments: object) -> int:
    """Returns its exit status."""
    child = FORK.Process(target=work, args=arguments)
    child.start()
    child.join()
    return child.exitcode or 0


def main() -> int:
    start = time.monotonic()
    try:
        programs = Programs()
    except LoadError as error:  # above it on stderr stands what the verifier said
        print(error, file=sys.stderr)
        nothing = {"sent_bytes": 0, "bypassed_bytes": {}, "mptcp_joined": {}, "from_before": 0}
        print(json.dumps(nothing))
        return 0
    load_s = round(time.monotonic() - start, 1)
    with accelerated(programs) as pod:
        joined = FORK.Value("i", 0)
        status = in_child(in_pod, pod) or in_child(from_before, pod, joined)
        bypassed = {hop: counted.bypassed_bytes for hop, counted in pod.counters().items()}
    found = {
        "load_s": load_s,
        "sent_bytes": 2 * ROUNDS * len(MESSAGE),
        "bypassed_bytes": bypassed,
        "mptcp_joined": mptcp.ends_that_join() if any(bypassed.values()) else {},
        "from_before": joined.value,
    }
    print(json.dumps(found))
    return status


if __name__ == "__main__":
    sys.exit(main())
