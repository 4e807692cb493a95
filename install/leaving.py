# SPDX-License-Identifier: Apache-2.0
"""Takes the sockets of a generation out of its sockhash, as `unload` and a new `load` do."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from cni_plugin import names
from install import log
from install.generations import Generation, opened
from install.passes import PassTimeout, Runner

PATIENCE_S = 5.0
_PAUSE_S = 0.01  # between passes: a socket leaves in three of them


def empty(generation: Generation, folders: Iterable[Path], patience_s: float = PATIENCE_S) -> bool:
    """Whether no socket is in the generation's sockhash any more.

    ``folders`` are the cgroups of the pods. A socket with unread bypassed bytes stays until its
    reader has read them, and one that no process has open (in flight between two) cannot leave.
    """
    generation.retire()
    if not generation.is_whole():  # version 0.1: its sockets leave as they close
        generation.set_paused(True)
        return not generation.has_sockets()
    deadline = time.monotonic() + patience_s
    pods, runner = set(folders), Runner()
    try:
        with opened(generation.folder / names.VISIT) as visit:
            while generation.has_sockets():
                if time.monotonic() > deadline:
                    return False
                for pod in sorted(pods):
                    try:
                        runner.run(visit, pod)
                    except BlockingIOError:
                        continue  # the joiner is at it
                    except (PassTimeout, EOFError, OSError):
                        pods.discard(pod)  # gone, or a pass that does not end
                time.sleep(_PAUSE_S)
    finally:
        runner.close()
    return True


def empty_all(generations: Iterable[Generation], folders: Iterable[Path]) -> None:
    """The same for several; says which of them have not come to their end."""
    pods = list(folders)
    for generation in generations:
        if not empty(generation, pods):
            log.warning(
                "sockets_left",
                f"sockets of {generation.folder.name} have unread bypassed bytes, or cannot be"
                " reached; they go on by TCP",
                generation=generation.folder.name,
            )
