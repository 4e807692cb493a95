# SPDX-License-Identifier: Apache-2.0
"""How tests/words.py counts, and that each source file names its licence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import words
from tests.words import ROOT, tracked

SUFFIXES = {".py", ".c", ".h", ".sh", ".proto", ".lua", ".spec"}
KERNEL = ("bpf", "tests/fuzz/host")  # the C there is loaded into the kernel, or compiles it
SOURCES = [path for path in tracked() if path.suffix in SUFFIXES]

C = """// SPDX-License-Identifier: GPL-2.0-only
/*
 * One reader. Whoever
 * writes waits.
 *
 * Another paragraph.
 */
int a; /* the first */
// two lines
// of one comment
"""


def test_comments_of_c() -> None:
    texts = [" ".join(text.split()) for text in words.of_c(C)]
    assert texts == [
        "One reader. Whoever writes waits.",
        "Another paragraph.",
        "the first",
        "two lines of one comment",
    ]


def test_comments_of_python() -> None:
    source = '"""Title.\n\nText.\n"""\n# one\n# comment\nA = 1  # noqa: X\nB = "# none"\n'
    assert list(words.of_python(source)) == ["Title.", "Text.", "one comment"]


def test_paragraphs_of_markdown() -> None:
    source = (
        "# Title\n\nOne `a b c`\n[link](x.md).\n\n    code\n\n| a | b |\n| - | - |\n| c | d |\n"
    )
    assert list(words.of_markdown(source)) == ["Title", "One code link.", "a", "b", "c", "d"]


def test_what_is_counted() -> None:
    text = "Nobody knows it. " + "word " * 9 + "word. " + "It is the reader's own."
    assert words.measured([text]) == {"pronouns": round(1000 / 18, 1), "sentence": 10}


def test_the_projects_files_are_those_of_git() -> None:
    found = {path.relative_to(words.ROOT).as_posix() for path in words.tracked()}
    assert {"Makefile", "install/program/agent/cri.proto", "tests/words.toml"} <= found
    assert not [path for path in found if "pyc" in path or "cri_pb2" in path or ".venv" in path]


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
