# SPDX-License-Identifier: Apache-2.0
"""python -m tests.words: how plainly the project is written, as numbers against ceilings.

Part of `make lint`. It reads the comments of C, the comments and docstrings of Python, and the
documents. In each it counts the pronouns that hide a subject, and how long the longest tenth of the
sentences is at least. It counts the words of all documents, and the files of the project, too.

tests/words.toml has the ceilings. They only fall: `--lower` writes those that can.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import io
import math
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import tomllib
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
CEILINGS = ROOT / "tests" / "words.toml"
PRONOUNS = re.compile(
    r"who(?:ever|se|m|mever)?|(?:no|some|any|every)body|(?:some|any|every)one"
    r"|(?:no|some|any|every)thing|whatever|whichever",
    re.IGNORECASE,
)
PER = 1000
SHORTEST = 4  # words of a sentence; less is a title, a name, a number
LONGEST = 0.9  # the share of sentences that are no longer


def tracked() -> list[Path]:
    """The project's files: all that .gitignore does not name."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    ignored = [line.strip("/").rpartition("/")[2] for line in lines] + [".git"]
    return [path for path in _walk(ROOT, ignored) if path.is_file()]


def _walk(folder: Path, ignored: list[str]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in ignored):
            continue
        yield path
        if path.is_dir():
            yield from _walk(path, ignored)


def of_c(source: str) -> Iterator[str]:
    """The paragraphs of its comments."""
    comments = re.findall(r"/\*(.*?)\*/|((?:^[ \t]*//[^\n]*\n)+|//[^\n]*)", source, re.S | re.M)
    for block, lines in comments:
        text = re.sub(r"^[ \t]*(?:\*|//)?[ \t]?", "", block or lines, flags=re.M)
        yield from (each for each in re.split(r"\n\s*\n", text) if "SPDX-" not in each)


def of_python(source: str) -> Iterator[str]:
    """The paragraphs of its docstrings, and its comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    comment: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(
            r"# (SPDX|type:|noqa|fmt:)", token.string
        ):
            comment.append(token.string.lstrip("# "))
        elif token.type not in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT) and comment:
            yield " ".join(comment)
            comment = []


def of_markdown(source: str) -> Iterator[str]:
    """Its paragraphs, list items, headings and table cells; code in a line is a word."""
    for token in MarkdownIt("commonmark").enable("table").parse(source):
        if token.type == "inline":
            yield "".join(_shown(child) for child in token.children or ())


def _shown(token: Token) -> str:
    shown = {"code_inline": "code", "softbreak": " ", "hardbreak": " "}
    return shown.get(token.type, token.content)


def words(text: str) -> list[str]:
    return re.findall(r"[^\W_][\w'-]*", text)


def measured(paragraphs: list[str]) -> dict[str, float]:
    """Pronouns of 1,000 words, and the length that nine tenths of the sentences do not pass."""
    all_words = [word for text in paragraphs for word in words(text)]
    sentences = [words(each) for text in paragraphs for each in re.split(r"(?<=[.!?])\s", text)]
    lengths = sorted(len(sentence) for sentence in sentences if len(sentence) >= SHORTEST)
    pronouns = sum(bool(PRONOUNS.fullmatch(word)) for word in all_words)
    return {
        "pronouns": round(PER * pronouns / len(all_words), 1),
        "sentence": lengths[math.ceil(LONGEST * len(lengths)) - 1],
    }


def numbers() -> dict[str, float]:
    """Everything that has a ceiling, by its name in tests/words.toml."""
    files = tracked()
    texts = {path: path.read_text(encoding="utf-8") for path in files if path.suffix in KINDS}
    found: dict[str, float] = {}
    for name, (suffixes, paragraphs_of) in WHERE.items():
        paragraphs = [
            each for path in texts if path.suffix in suffixes for each in paragraphs_of(texts[path])
        ]
        found |= {f"{name}_{what}": value for what, value in measured(paragraphs).items()}
    documents = [text for path, text in texts.items() if path.suffix == ".md"]
    written = [text for text in documents if "; do not edit" not in text[:200]]  # by hand
    found["docs_words"] = sum(len(text.split()) for text in written)
    found["files"] = len(files)
    return found


WHERE = {
    "c": ((".c", ".h"), of_c),
    "python": ((".py",), of_python),
    "docs": ((".md",), of_markdown),
}
KINDS = {suffix for suffixes, _ in WHERE.values() for suffix in suffixes}


def main() -> int:
    """Returns 1 when a number passes its ceiling."""
    parser = argparse.ArgumentParser(prog="python -m tests.words", description=__doc__)
    parser.add_argument("--lower", action="store_true", help="lower the ceilings that can be")
    arguments = parser.parse_args()
    ceilings = tomllib.loads(CEILINGS.read_text(encoding="utf-8"))
    found = numbers()
    if arguments.lower:
        ceilings = {name: min(value, ceilings.get(name, value)) for name, value in found.items()}
        text = "".join(f"{name} = {value:g}\n" for name, value in ceilings.items())
        head = CEILINGS.read_text(encoding="utf-8").partition("\n\n")[0]
        CEILINGS.write_text(f"{head}\n\n{text}", encoding="utf-8")
    for name, value in found.items():
        print(f"{name:16} {value:8g}  of at most {ceilings[name]:g}")
    above = [name for name, value in found.items() if value > ceilings[name]]
    if above:
        print(f"above the ceiling of tests/words.toml: {', '.join(above)}", file=sys.stderr)
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
