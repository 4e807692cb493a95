# SPDX-License-Identifier: Apache-2.0
"""How the sockets' files were opened: fdinfo(5) of the processes that hold them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection
from pathlib import Path

_SOCKET = re.compile(r"socket:\[(\d+)\]")
_FLAGS = re.compile(r"^flags:\s*([0-7]+)$", re.MULTILINE)


def blocking(
    host_proc: Path, namespaces: Collection[str], inodes: Collection[int]
) -> dict[int, bool]:
    """Whether each of these sockets' files blocks; one that no process is seen to hold is left out.

    Only processes of these network namespaces (paths) are looked at. Raises OSError for a
    namespace that is gone.
    """
    wanted, found = {Path(each).stat().st_ino for each in namespaces}, {}
    for process in host_proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if (process / "ns/net").stat().st_ino in wanted:
                found.update(_of_process(process, inodes))
    return found


def _of_process(process: Path, inodes: Collection[int]) -> dict[int, bool]:
    found = {}
    for fd in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed since it was listed
            match = _SOCKET.fullmatch(str(fd.readlink()))
            if match and int(match[1]) in inodes:
                flags = _FLAGS.search((process / "fdinfo" / fd.name).read_text())
                if flags:
                    found[int(match[1])] = not int(flags[1], 8) & os.O_NONBLOCK
    return found
