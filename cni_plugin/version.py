# SPDX-License-Identifier: Apache-2.0
"""VERSION. CRI-O asks every plugin at each change of the conf folder, so: next to no imports."""

from __future__ import annotations

import os
import select

from cni_plugin.names import CNI_VERSIONS, NEWEST_CNI_VERSION

# The reference implementation does not read standard input at all, so some caller may have left it
# open. A caller that writes no byte for this long gets the answer to an empty request.
_PATIENCE_MS = 100
_SUPPORTED = ", ".join(f'"{version}"' for version in CNI_VERSIONS)


def answer(stdin: int) -> str:
    """The JSON document; ``cniVersion`` is the caller's if they named one we speak."""
    asked = _asked(_read(stdin))
    return f'{{"cniVersion": "{asked}", "supportedVersions": [{_SUPPORTED}]}}'


def _read(fd: int) -> bytes:
    chunks = []
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    try:
        while poll.poll(_PATIENCE_MS):
            chunk = os.read(fd, 65536)
            if not chunk:
                break
            chunks.append(chunk)
    except OSError:
        pass  # a closed standard input is an empty request
    return b"".join(chunks)


def _asked(data: bytes) -> str:
    # libcni's own words, for which json's import can be spared (5 of 15 ms).
    for version in CNI_VERSIONS:
        if data.strip() == f'{{"cniVersion":"{version}"}}'.encode():
            return version
    if not data:
        return NEWEST_CNI_VERSION
    import json  # noqa: PLC0415

    try:
        conf = json.loads(data)
        asked = conf["cniVersion"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return NEWEST_CNI_VERSION
    return asked if asked in CNI_VERSIONS else NEWEST_CNI_VERSION
