# SPDX-License-Identifier: Apache-2.0
"""DEL: take out what this attachment put in, however little of it is left.

A DEL that fails keeps the pod Terminating and its address leaked, for the sake of an
acceleration. So only a malformed call fails. What cannot be undone, be it that another process
never lets go of the node's lock, stays recorded for GC, and the kernel drops it by itself with
the pod's cgroup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_plugin import log, policy
from cni_plugin.netconf import folders
from cni_plugin.state import Key, State

if TYPE_CHECKING:
    from cni_plugin.protocol import Request

_LOCK_PATIENCE_S = 5.0


def delete(request: Request) -> None:
    """Never fails; what it leaves, it says."""
    bpffs, state_dir = folders(request.conf)
    state = State(state_dir)
    key = Key(request.call.container_id, request.call.ifname)
    try:
        if state.has(key) or policy.may_concern_us(request.conf, policy.pod_of(request)):
            with state.locked(_LOCK_PATIENCE_S):
                _undo(request, state, bpffs, key)
    except Exception as error:
        log.say(f"warning: left for GC: {type(error).__name__}: {error}")


def _undo(request: Request, state: State, bpffs: str, key: Key) -> None:
    """Without a record (lost, or torn by a power cut) the request may still tell the cgroup."""
    from cni_plugin import attachment, cgroup  # noqa: PLC0415 - ctypes, not for other pods

    record = state.read(key)
    if record is None:
        uid = policy.pod_of(request).uid
        folder, _ = cgroup.find(policy.cgroup_path_of(request), uid)
        if folder is not None:
            # What is there is ours only if the kernel's record has this attachment's ID.
            attachment.take_out(str(folder), folder.stat().st_ino, attachment.pod_id(*key))
    attachment.undo(state, bpffs, key, record)
