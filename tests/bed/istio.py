"""The iptables rules that send a pod's TCP through its sidecar (REDIRECT mode, IPv4)."""

from __future__ import annotations

import subprocess

from tests.bed.netns import NetNamespace

OUTBOUND_PORT = 15001
INBOUND_PORT = 15006

# As istio-iptables writes them (istio/istio, tools/istio-iptables, Istio 1.20, no exclusions).
RULES = f"""
*nat
:ISTIO_INBOUND - [0:0]
:ISTIO_REDIRECT - [0:0]
:ISTIO_IN_REDIRECT - [0:0]
:ISTIO_OUTPUT - [0:0]
-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {OUTBOUND_PORT}
-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {INBOUND_PORT}
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A ISTIO_INBOUND -p tcp --dport 15090 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15021 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15020 -j RETURN
-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
-A OUTPUT -p tcp -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -o lo -s 127.0.0.6/32 -j RETURN
-A ISTIO_OUTPUT -o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 \
 -m owner --uid-owner {{proxy}} -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner {{proxy}} -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner {{proxy}} -j RETURN
-A ISTIO_OUTPUT -o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 \
 -m owner --gid-owner {{proxy}} -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --gid-owner {{proxy}} -j RETURN
-A ISTIO_OUTPUT -m owner --gid-owner {{proxy}} -j RETURN
-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
COMMIT
"""


def redirect(netns: NetNamespace, proxy_uid: int) -> None:
    """Install the rules in a pod's namespace.

    Raises:
        RuntimeError: iptables-restore refused them.
    """
    with netns.entered():
        done = subprocess.run(
            ["iptables-restore", "--wait", "5"],
            input=RULES.format(proxy=proxy_uid),
            text=True,
            capture_output=True,
            check=False,
        )
    if done.returncode != 0:
        raise RuntimeError(f"iptables-restore in {netns.name}: {done.stderr.strip()}")
