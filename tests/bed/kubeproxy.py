# SPDX-License-Identifier: Apache-2.0
"""The node's own iptables rules: a service's ClusterIP as kube-proxy has it; network policies."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tests.bed import addresses
from tests.bed.addresses import Family, family_of, on_the_wire
from tests.bed.netns import NetNamespace
from tests.bed.pingpong import APP_PORT, SERVICE_PORT
from tests.bed.pod import Pod

JUMPS = """
{action} PREROUTING -j KUBE-SERVICES
{action} OUTPUT -j KUBE-SERVICES
{action} POSTROUTING -j KUBE-POSTROUTING
"""
# As kube-proxy writes them (kubernetes, pkg/proxy/iptables/proxier.go, mode iptables).
CHAINS = """
:KUBE-SERVICES - [0:0]
:KUBE-SVC-WEB - [0:0]
:KUBE-SEP-WEB - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-SERVICES -d {service} -p tcp --dport {service_port} -j KUBE-SVC-WEB
-A KUBE-SVC-WEB -j KUBE-SEP-WEB
-A KUBE-SEP-WEB -s {pod} -j KUBE-MARK-MASQ
-A KUBE-SEP-WEB -p tcp -j DNAT --to-destination {endpoint}
"""


@contextmanager
def service(host: NetNamespace, server: Pod, *families: Family) -> Iterator[None]:
    """The ClusterIP of these families leads to the server's pod while the context lasts."""
    families = tuple({on_the_wire(family) for family in families})
    for family in families:
        pod = server.address(family)
        chains = CHAINS.format(
            service=addresses.OF[family].service,
            service_port=SERVICE_PORT,
            pod=pod,
            endpoint=f"{addresses.url_host(pod)}:{APP_PORT}",
        )
        _restore(host, family, chains + JUMPS.format(action="-A"))
    try:
        yield
    finally:
        for family in families:
            _restore(host, family, JUMPS.format(action="-D"))


def _restore(host: NetNamespace, family: Family, rules: str) -> None:
    command = f"{_command(family == 'v6')}-restore"
    _run(host, [command, "--noflush", "--wait", "5"], f"*nat{rules}COMMIT\n")


@contextmanager
def denied(host: NetNamespace, client: Pod, server: Pod) -> Iterator[None]:
    """A network policy: no packet from one pod reaches the other while the context lasts."""
    pairs = [
        (source, target)
        for source in client.ips
        for target in server.ips
        if family_of(source) == family_of(target)
    ]
    _drop(host, "-I", pairs)
    try:
        yield
    finally:
        _drop(host, "-D", pairs)


def _drop(host: NetNamespace, action: str, pairs: Sequence[tuple[str, str]]) -> None:
    for source, target in pairs:
        rule = ["FORWARD", "-s", source, "-d", target, "-j", "DROP"]
        _run(host, [_command(family_of(source) == "v6"), "--wait", "5", action, *rule])


def _command(ipv6: bool) -> str:
    return "ip6tables" if ipv6 else "iptables"


def _run(host: NetNamespace, argv: Sequence[str], stdin: str | None = None) -> None:
    with host.entered():
        done = subprocess.run(argv, input=stdin, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)} in {host.name}: {done.stderr.strip()}")
