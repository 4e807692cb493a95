# SPDX-License-Identifier: Apache-2.0
"""Blocking sockets, two threads a connection: one in sendall, one in recv.

`echo_threads.py serve PORT`, `echo_threads.py client HOST PORT BYTES TIMES`; the client prints
"right TIMES" and the microseconds of each time, a line each.
"""

import socket
import sys
import threading
import time

from tests.apps.programs.contract import compare, pattern


def echo(connection: socket.socket) -> None:
    """Send back everything, in a thread of its own per connection."""
    with connection:
        while part := connection.recv(65536):
            connection.sendall(part)


def serve(port: int) -> None:
    """Accept for ever."""
    with socket.create_server(("0.0.0.0", port)) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=echo, args=(connection,), daemon=True).start()


def client(host: str, port: int, size: int, times: int) -> None:
    """Everything there and back."""
    sent, taken = pattern(size), []
    for _ in range(times):
        start = time.perf_counter()
        with socket.create_connection((host, port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sender = threading.Thread(target=connection.sendall, args=(sent,))
            sender.start()
            got = bytearray()
            while len(got) < size and (part := connection.recv(1 << 20)):
                got += part
            sender.join()
        compare(bytes(got), sent)
        taken.append((time.perf_counter() - start) * 1e6)
    print(f"right {times}")
    print("\n".join(f"{each:.1f}" for each in taken))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        client(sys.argv[2], *map(int, sys.argv[3:6]))
