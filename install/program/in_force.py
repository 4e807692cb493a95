# SPDX-License-Identifier: Apache-2.0
"""What ADD goes by: our entry in the network configuration, under the cluster's switch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cni_plugin import netconf
from cni_plugin.netconf import CONFIGURATION, SWITCH, NetConf
from cni_plugin.state import State
from install.program import conf_dir
from install.program.conflist import Json

AUTO = "auto"  # the mode is the self-test's


@dataclass(frozen=True)
class InForce:
    """The configuration under the switch; the mode of pods that start now, and why it is."""

    conf: NetConf
    mode: str
    reason: str

    @property
    def decided(self) -> tuple[str, str]:
        """As policy.decide() takes it."""
        return self.mode, self.reason


def named_mode(configured: str | None, by_switch: str | None) -> tuple[str, str] | None:
    """The mode that is not left to the self-test, and what names it; None when nothing does.

    The switch comes first, with `auto` too.
    """
    named = (by_switch, SWITCH) if by_switch else (configured or AUTO, CONFIGURATION)
    return None if named[0] == AUTO else named


def in_force(state: State, entry: Json, where: Path) -> InForce:
    """``where`` is the file of our entry, for messages.

    Raises ValueError when entry or switch make no sense, OSError when the switch cannot be read.
    """
    own, switch = conf_dir.parsed(entry, where), state.switch()
    conf = netconf.under_switch(own, switch)
    named = named_mode(own.mode, switch["mode"] if switch is not None else None)
    if named is None:
        return InForce(conf, *state.node_mode())
    mode, by = named
    return InForce(conf, mode, f"{by} says so")
