# SPDX-License-Identifier: Apache-2.0
"""The iptables rules that send a pod's TCP through its sidecar, for IPv4 and IPv6."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Literal

from tests.bed.netns import NetNamespace

OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
TPROXY_MARK = 1337
OUTBOUND_MARK = 1338
TPROXY_TABLE = 133
UNTOUCHED_PORTS = (15090, 15021, 15020)  # metrics and health of the sidecar itself


@dataclass(frozen=True)
class Interception:
    """What a pod's annotations traffic.sidecar.istio.io/... and interceptionMode ask for."""

    mode: Literal["REDIRECT", "TPROXY"] = "REDIRECT"
    exclude_inbound_ports: tuple[int, ...] = ()
    exclude_outbound_ports: tuple[int, ...] = ()
    include_outbound_ranges: tuple[str, ...] = ()  # none: all of them


@dataclass(frozen=True)
class _Family:
    loopback: str
    envoy: str
    restore: str
    ip: tuple[str, ...]
    default: str


_IPV4 = _Family("127.0.0.1/32", "127.0.0.6/32", "iptables-restore", ("ip",), "0.0.0.0/0")
_IPV6 = _Family("::1/128", "::6/128", "ip6tables-restore", ("ip", "-6"), "::/0")


def intercept(netns: NetNamespace, proxy: int, wanted: Interception, *, ipv6: bool = False) -> None:
    """Install the rules in a pod's namespace, with ipv6 those of both families.

    `proxy` is the number of the sidecar's user or group.

    Raises:
        RuntimeError: iptables or ip refused something.
    """
    for family in (_IPV4, _IPV6) if ipv6 else (_IPV4,):
        tables = _nat(family, proxy, wanted)
        if wanted.mode == "TPROXY":
            tables += _mangle(family, proxy, wanted)
            mark = ("fwmark", str(TPROXY_MARK), "lookup", str(TPROXY_TABLE))
            route = ("local", family.default, "dev", "lo", "table", str(TPROXY_TABLE))
            _run(netns, *family.ip, "rule", "add", *mark)
            _run(netns, *family.ip, "route", "add", *route)
        if family is _IPV6:  # 127.0.0.0/8 is the machine's own anyway; of IPv6 only ::1 is
            _run(netns, "ip", "-6", "address", "add", family.envoy, "dev", "lo")
        _run(netns, family.restore, "--wait", "5", stdin=tables)


# As istio-iptables writes them for istio-init (tools/istio-iptables/pkg/capture/run.go): the same
# from Istio 1.25 to 1.31 (1.31.0-rc.0, and release-1.31 of 2026-08-20).
def _nat(family: _Family, proxy: int, wanted: Interception) -> str:
    lines = [
        "*nat",
        ":ISTIO_INBOUND - [0:0]",
        ":ISTIO_REDIRECT - [0:0]",
        ":ISTIO_IN_REDIRECT - [0:0]",
        ":ISTIO_OUTPUT - [0:0]",
        "-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN",
        f"-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {OUTBOUND_PORT}",
        f"-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {INBOUND_PORT}",
    ]
    if wanted.mode == "REDIRECT":
        lines += ["-A PREROUTING -p tcp -j ISTIO_INBOUND", *_untouched(wanted)]
        lines += ["-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT"]
    lines += ["-A OUTPUT -j ISTIO_OUTPUT"]
    for port in wanted.exclude_outbound_ports:
        lines += [f"-A ISTIO_OUTPUT -p {each} --dport {port} -j RETURN" for each in ("tcp", "udp")]
    lines += [f"-A ISTIO_OUTPUT -o lo -s {family.envoy} -j RETURN"]
    for owner in ("uid", "gid"):
        lines += [
            f"-A ISTIO_OUTPUT -o lo ! -d {family.loopback} -p tcp ! --dport 15008"
            f" -m owner --{owner}-owner {proxy} -j ISTIO_IN_REDIRECT",
            f"-A ISTIO_OUTPUT -o lo -m owner ! --{owner}-owner {proxy} -j RETURN",
            f"-A ISTIO_OUTPUT -m owner --{owner}-owner {proxy} -j RETURN",
        ]
    lines += [f"-A ISTIO_OUTPUT -d {family.loopback} -j RETURN"]
    ranges = wanted.include_outbound_ranges or (family.default,)
    ours = [each for each in ranges if (":" in each) == (":" in family.default)]
    lines += [f"-A ISTIO_OUTPUT -d {each} -j ISTIO_REDIRECT" for each in ours]
    return "\n".join([*lines, "COMMIT", ""])


def _mangle(family: _Family, proxy: int, wanted: Interception) -> str:
    """TPROXY: inbound packets reach the sidecar with the client's and the pod's own address."""
    proxied = f"-p tcp -m mark --mark {TPROXY_MARK}"
    owned = f"-A OUTPUT ! -d {family.loopback} -p tcp -o lo -m owner"
    lines = [
        "*mangle",
        ":ISTIO_DIVERT - [0:0]",
        ":ISTIO_TPROXY - [0:0]",
        ":ISTIO_INBOUND - [0:0]",
        f"-A ISTIO_DIVERT -j MARK --set-mark {TPROXY_MARK}",
        "-A ISTIO_DIVERT -j ACCEPT",
        f"-A ISTIO_TPROXY ! -d {family.loopback} -p tcp -j TPROXY"
        f" --tproxy-mark {TPROXY_MARK}/0xffffffff --on-port {INBOUND_PORT}",
        "-A PREROUTING -p tcp -j ISTIO_INBOUND",
        f"-A ISTIO_INBOUND {proxied} -j RETURN",
        f"-A ISTIO_INBOUND -p tcp -s {family.envoy} -i lo -j RETURN",
        f"-A ISTIO_INBOUND -p tcp -i lo -m mark ! --mark {OUTBOUND_MARK} -j RETURN",
        *_untouched(wanted),
        "-A ISTIO_INBOUND -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT",
        "-A ISTIO_INBOUND -p tcp -j ISTIO_TPROXY",
        f"-A PREROUTING {proxied} -j CONNMARK --save-mark",
        f"-A OUTPUT -p tcp -o lo -m mark --mark {TPROXY_MARK} -j RETURN",
        f"{owned} --uid-owner {proxy} -j MARK --set-mark {OUTBOUND_MARK}",
        f"{owned} --gid-owner {proxy} -j MARK --set-mark {OUTBOUND_MARK}",
        f"-A OUTPUT -p tcp -m connmark --mark {TPROXY_MARK} -j CONNMARK --restore-mark",
    ]
    return "\n".join([*lines, "COMMIT", ""])


def _untouched(wanted: Interception) -> list[str]:
    ports = (*UNTOUCHED_PORTS, *wanted.exclude_inbound_ports)
    return [f"-A ISTIO_INBOUND -p tcp --dport {port} -j RETURN" for port in ports]


def _run(netns: NetNamespace, *argv: str, stdin: str | None = None) -> None:
    if netns.users:  # only from there may a rule name a user (owner_check, xt_owner.c)
        argv = ("nsenter", f"--user={netns.users}", *argv)
    with netns.entered():
        done = subprocess.run(argv, input=stdin, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} in {netns.name}: {done.stderr.strip()}")
