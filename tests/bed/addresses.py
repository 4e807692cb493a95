# SPDX-License-Identifier: Apache-2.0
"""The address families of the testbed, and what stands for what in each.

"mapped" is IPv4 spoken by an AF_INET6 socket, as dual-stack programs (Go, Java, Node) do: on the
wire it is IPv4, in the socket its addresses are ::ffff:a.b.c.d.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Literal

Family = Literal["v4", "v6", "mapped"]
FAMILIES: tuple[Family, ...] = ("v4", "v6", "mapped")
MAPPED = "::ffff:"


@dataclass(frozen=True)
class Addresses:
    """A family's well-known addresses."""

    any: str  # bound to by who takes all
    loopback: str
    envoy: str  # where Envoy's connections to its application come from, in Istio
    service: str  # a ClusterIP: on no interface, only iptables makes it lead anywhere


OF: dict[Family, Addresses] = {
    "v4": Addresses("0.0.0.0", "127.0.0.1", "127.0.0.6", "10.96.0.10"),
    "v6": Addresses("::", "::1", "::6", "fd00:10:96::10"),
    "mapped": Addresses("::", "::ffff:127.0.0.1", "::ffff:127.0.0.6", "::ffff:10.96.0.10"),
}


def family_of(ip: str) -> Family:
    """The family that an address is written in."""
    if ip.startswith(MAPPED):
        return "mapped"
    return "v4" if ipaddress.ip_address(ip).version == 4 else "v6"


def on_the_wire(family: Family) -> Family:
    """What the packets of a family are."""
    return "v4" if family == "mapped" else family


def url_host(ip: str) -> str:
    """An address as it stands in a URL."""
    return f"[{ip}]" if ":" in ip else ip
