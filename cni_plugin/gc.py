# SPDX-License-Identifier: Apache-2.0
"""GC: remove what belongs to attachments of this network that the runtime no longer has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cni_plugin import attachment, log, names
from cni_plugin.netconf import folders
from cni_plugin.protocol import GcIncomplete, InvalidConfig, TryAgainLater
from cni_plugin.state import Key, State

if TYPE_CHECKING:
    from cni_plugin.protocol import Request

_LOCK_PATIENCE_S = 5.0


def collect(request: Request) -> None:
    """Goes on after a failure; raises GcIncomplete with all of them at the end.

    Without the key no attachment is known to be stale; null, which is how Go prints a list never
    set, counts as absent. Other networks on this node have their own list: their attachments stay.
    """
    listed = request.conf.get(names.VALID_ATTACHMENTS)
    if listed is None:
        return
    valid = _parse(listed)
    bpffs, state_dir = folders(request.conf)
    state = State(state_dir)
    failures = []
    try:
        recorded = state.keys()
    except OSError as error:
        raise GcIncomplete("what is recorded cannot be read", str(error)) from error
    for key in recorded:
        if key in valid:
            continue
        try:
            with state.locked(_LOCK_PATIENCE_S):
                record = state.read(key)
                if record is not None and record.network != request.name:
                    continue
                attachment.undo(state, bpffs, key, record)
                log.say(f"removed stale attachment {key.container_id}/{key.ifname}")
        except TimeoutError as error:
            raise TryAgainLater("the state folder is locked", str(error)) from error
        except OSError as error:
            failures.append(f"{key.container_id}/{key.ifname}: {error}")
    if failures:
        raise GcIncomplete("stale attachments could not be removed", "; ".join(failures))


def _parse(listed: object) -> set[Key]:
    """Raises InvalidConfig: a list that is not understood must not look like a short one."""
    if not isinstance(listed, list):
        raise InvalidConfig(f"{names.VALID_ATTACHMENTS} is not a list", f"{listed!r:.80}")
    valid = set()
    for entry in listed:
        container_id = entry.get("containerID") if isinstance(entry, dict) else None
        ifname = entry.get("ifname") if isinstance(entry, dict) else None
        if not (isinstance(container_id, str) and isinstance(ifname, str)):
            raise InvalidConfig(
                f"{names.VALID_ATTACHMENTS} has an entry without containerID and ifname",
                f"{entry!r:.80}",
            )
        valid.add(Key(container_id, ifname))
    return valid
