# SPDX-License-Identifier: Apache-2.0
"""Makes sockets where it is told to: `traffic.py`, with one end of a socketpair as its stdin.

A socket belongs for life to the network namespace, cgroup and user it was made in, and so do the
connections accepted on it, whoever holds the file descriptor. So one process that makes sockets
in any pod and passes them on lets a test be written as straight lines, in one process.

Asked with JSON {move, netns, cgroup, uid, gid, family, type, protocol}; answers {errno} and the
socket.
`move` is false where it is in that pod already: a change of cgroup costs milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket

CLONE_NEWNET = 0x40000000  # linux/sched.h
MAX_REQUEST = 4096

libc = ctypes.CDLL(None, use_errno=True)


def move_to(netns: str, cgroup: str) -> None:
    """Put this process into a network namespace and a cgroup2 folder."""
    with open(f"{cgroup}/cgroup.procs", "w") as procs:  # noqa: PTH123 - without site: start fast
        procs.write("0")
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    if libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns to {netns}")
    os.close(fd)


def become_root() -> None:
    os.seteuid(0)
    os.setegid(0)


def main() -> None:
    """Serve requests until the other end is closed."""
    channel = socket.socket(fileno=0)
    while request := channel.recv(MAX_REQUEST):
        wanted = json.loads(request)
        try:
            if wanted["move"]:
                move_to(wanted["netns"], wanted["cgroup"])
            os.setegid(wanted["gid"])
            os.seteuid(wanted["uid"])
            with socket.socket(wanted["family"], wanted["type"], wanted["protocol"]) as made:
                become_root()
                if wanted["type"] == socket.SOCK_STREAM:  # without it no socket joins
                    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                socket.send_fds(channel, [json.dumps({"errno": 0}).encode()], [made.fileno()])
        except OSError as error:
            become_root()
            channel.send(json.dumps({"errno": error.errno}).encode())


if __name__ == "__main__":
    main()
