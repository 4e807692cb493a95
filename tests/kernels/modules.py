# SPDX-License-Identifier: Apache-2.0
"""The modules that the guests get: network namespaces' links, NAT, BBR, kTLS and its ciphers.

A guest has no modprobe. So modules are stored uncompressed and named in the order in which they
must be loaded.
"""

from __future__ import annotations

import lzma
import re
from pathlib import Path

# What `ip link add`, `iptables -t nat` (over nftables) and setsockopt(TCP_ULP, TCP_CONGESTION)
# would have asked for. What a kernel has built in, or not at all (Debian's 5.10: tls), is not among
# its modules.
WANTED = (
    "aesni_intel", "bridge", "ctr", "gcm", "ghash_generic", "loop", "nf_conntrack_netlink",
    "nft_chain_nat", "nft_compat", "nft_counter", "tcp_bbr", "tls", "veth", "xt_REDIRECT",
    "xt_comment", "xt_conntrack", "xt_multiport", "xt_nat", "xt_owner", "xt_tcpudp",
)  # fmt: skip

STAMP = "wanted"

_DEPENDS = re.compile(rb"\bdepends=([^\0]*)\0")


def store(tree: Path, target: Path) -> None:
    """Writes the wanted modules below `tree`, and those they depend on, to the folder `target`."""
    target.mkdir(parents=True, exist_ok=True)
    (target / STAMP).write_text(" ".join(WANTED))
    for number, (name, content) in enumerate(in_load_order(tree).items()):
        (target / f"{number:03}-{name}.ko").write_bytes(content)


def has_stored(target: Path) -> bool:
    """Whether the folder holds what is wanted now."""
    stamp = target / STAMP
    return stamp.exists() and stamp.read_text() == " ".join(WANTED)


def in_load_order(tree: Path) -> dict[str, bytes]:
    """Name and content of every wanted module, each after those it depends on."""
    files = {_name(path.name.partition(".")[0]): path for path in tree.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return
        content = _read(files[name])
        found = _DEPENDS.search(content)
        for needed in found[1].decode().split(",") if found else ():
            add(_name(needed))
        ordered[name] = content

    for name in WANTED:
        add(name)
    return ordered


def _name(stem: str) -> str:
    return stem.replace("-", "_")


def _read(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
