# SPDX-License-Identifier: Apache-2.0
"""How tests/words.py counts."""

from __future__ import annotations

from tests import words

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
