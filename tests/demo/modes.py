# SPDX-License-Identifier: Apache-2.0
"""In which modes the demo measures, and what it calls them."""

from __future__ import annotations

from typing import Literal, get_args

from cni_plugin import names

Mode = Literal["auto", "full", "proxy-only"]  # as in the plugin's configuration
MODES: tuple[Mode, ...] = get_args(Mode)


def chosen(asked: Mode | None, verdict: str) -> list[Mode]:
    """The modes to measure, in this order, where the self-test's verdict is one of names.MODES.

    Unless one is asked for: what `auto` gives and, if that is less than `full`, `full` as well.
    Where `auto` gives "off" it leaves no bypass to measure.
    """
    wanted: list[Mode] = ["auto", "full"] if verdict != "full" else ["auto"]
    if asked is not None:
        wanted = [asked]
    return [mode for mode in wanted if (mode, verdict) != ("auto", "off")]


def title(mode: Mode, verdict: str) -> str:
    """What a table of figures in this mode is called."""
    if mode == "auto":
        return f"mode {verdict}, what auto decides here"
    if names.MODES.index(mode) < names.MODES.index(verdict):  # the mode that gives most is first
        return f"mode {mode}, which this kernel must be forced to"
    return f"mode {mode}, forced"
