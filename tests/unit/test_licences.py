# SPDX-License-Identifier: Apache-2.0
"""Each source file names its licence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.words import ROOT, tracked

SUFFIXES = {".py", ".c", ".h", ".sh", ".proto", ".lua", ".spec"}
KERNEL = ("bpf", "tests/fuzz/host")  # the C there is loaded into the kernel, or compiles it
SOURCES = [path for path in tracked() if path.suffix in SUFFIXES]


def licence_of(path: Path) -> str:
    where = path.relative_to(ROOT).as_posix()
    is_kernel = path.suffix in {".c", ".h"} and where.startswith(KERNEL)
    return "GPL-2.0-only" if is_kernel else "Apache-2.0"


@pytest.mark.parametrize("licence", ["Apache-2.0", "GPL-2.0-only"])
def test_the_first_lines_name_the_licence(licence: str) -> None:
    """A file that is missing here: its first line shall be `# SPDX-License-Identifier: ...`."""
    expected = {path for path in SOURCES if licence_of(path) == licence}
    found = set()
    for path in SOURCES:
        head = "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:3])
        if re.findall(r"SPDX-License-Identifier: ([^\s*]+)", head) == [licence]:
            found.add(path)
    assert expected
    assert found == expected


def test_the_licences_are_there() -> None:
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    assert "Version 2, June 1991" in (ROOT / "LICENSE.GPL-2.0").read_text()
