# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the frozen plugin: a folder of the same form; its program starts at once."""

from __future__ import annotations

from pathlib import Path

_PROGRAM = """\
#!/bin/sh
case "$CNI_COMMAND" in
VERSION) echo '{"cniVersion": "1.1.0", "supportedVersions": ["0.3.1", "1.0.0", "1.1.0"]}' ;;
*) cat "$(dirname "$(readlink -f "$0")")/_internal/release" ;;
esac
"""


def made(folder: Path, release: str = "1") -> Path:
    """Make it there; its program answers VERSION, and every other command with the release."""
    (folder / "_internal").mkdir(parents=True)
    (folder / "_internal" / "release").write_text(release)
    program = folder / "tcpip-bypass"
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    return folder
