# SPDX-License-Identifier: Apache-2.0
"""The command lines that `tcpip-bypass-node --help` shows."""

from __future__ import annotations

import argparse
import shlex

import pytest

from install.program.cli import build_parser
from install.program.examples import EXAMPLES, PROGRAM

LINES = [arguments for examples in EXAMPLES.values() for _, arguments in examples]


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (
        each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction)
    )
    return dict(action.choices)


def test_every_command_has_one() -> None:
    assert set(EXAMPLES) == set(commands())


@pytest.mark.parametrize("arguments", LINES)
def test_the_program_takes_it(arguments: str) -> None:
    assert (
        build_parser().parse_args(shlex.split(arguments)).command == arguments.split(maxsplit=1)[0]
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_commands_help_shows_it(name: str) -> None:
    shown = commands()[name].format_help()
    assert all(f"{PROGRAM} {arguments}" in shown for _, arguments in EXAMPLES[name])
    assert f"{PROGRAM} {EXAMPLES[name][0][1]}" in build_parser().format_help()
