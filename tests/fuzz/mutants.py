# SPDX-License-Identifier: Apache-2.0
"""The programs with one of their rules taken out, by editing a copy of the source."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bpf.loader import Programs
from tests import light


@dataclass(frozen=True)
class Edit:
    """Replaces a pattern, which must match `times` times: else the program has moved on."""

    pattern: str
    replacement: str
    times: int = 1

    def apply(self, source: str) -> str:
        """Raises ValueError when the pattern does not match as often as it must."""
        changed, count = re.subn(self.pattern, lambda _: self.replacement, source)
        if count != self.times:
            raise ValueError(f"{count} matches of {self.pattern!r}, expected {self.times}")
        return changed


@dataclass(frozen=True)
class Mutant:
    """A rule, and the edits that take it out."""

    rule: str
    edits: tuple[Edit, ...]

    def edit(self, source: str) -> str:
        for edit in self.edits:
            source = edit.apply(source)
        return source

    def programs(self) -> Programs:
        return light.edited(self.edit, limits=light.LIMITS)


ORDER = Mutant(
    "order: to the bypass although TCP bytes lie unread",
    (Edit(r"\t\tif \(\(__u32\)mark == write_seq\)\n", "\t\tif (1)\n"),),
)

# Pairing by addresses alone is not enough to go wrong: a mark is a sequence number as well, and a
# stranger's does not fit. So that wall goes, too.
IDENTITY = Mutant(
    "identity: paired by addresses, not by sequence numbers",
    (
        *ORDER.edits,
        Edit(r"(?<!dial\.)client_isn = [^;]+;", "client_isn = 0;", 3),
        Edit(r"server_isn = [^;]+;", "server_isn = 0;", 3),
        Edit(r"if \(found->client\.id \|\| ", "if ("),
        Edit(r"half->server\.id \|\| half->server_netns != netns", "0"),
        Edit(r"if \(half && half->client\.id != conn->me\.id\)", "if (0)"),
    ),
)

REUSED_SOCKET = Mutant(
    "identity: a socket that disconnected keeps its bypass queue",
    (Edit(r"if \(conn->me\.id\)\n\t\tsockhash\.delete\(&conn->me\.id\);", ""),),
)

BACKPRESSURE = Mutant(
    "backpressure: nothing stops a redirecting sender",
    (Edit(r"if \(unread > conn->bound\)", "if (0)"),),
)

CONNTRACK = Mutant(
    "conntrack: no keepalive",
    (Edit(r"if \(!seconds \|\| [^\n]+\n\t\treturn;", "return;"),),
)

HALF_CLOSED = Mutant(
    "conntrack: bypassed bytes on a half-closed connection",
    (Edit(r"if \(tb_is_half_closed\(conn, tp\)\)", "if (0)"),),
)

WAKE_UP = Mutant(
    "wake-up: to the bypass although a reader sleeps on the TCP queue",
    (Edit(r" \|\| tb_has_sleeper\(conn->me\.sk\)\)", ")"),),
)

STALE_MARK = Mutant(
    "stale mark: believed again after the sequence numbers have wrapped",
    (Edit(r"if \(mark && mark != conn->tx_dead\)", "if (mark)"),),
)

OVERTAKING = Mutant(
    "order: a message by TCP overtakes another thread's redirect",
    (Edit(r"return !conn->writer \|\| [^;]+;", "return 1;"),),
)

LEAVING_UNREAD = Mutant(
    "removal: a socket leaves with bypassed bytes unread",
    (Edit(r"if \(!tb_has_read_all\(&conn->me\)\)\n\t\treturn;", ""),),
)

ANNOUNCED_ELSEWHERE = Mutant(
    "identity: a server joins what another namespace's listener has announced",
    (Edit(r" \|\| half->server_netns != netns\)", ")"),),
)

FOLLOWING_UNREAD = Mutant(
    "removal: a reader follows its peer with bypassed bytes unread",
    (Edit(r"(?<=== TB_PARTED) &&\s+tb_has_read_all\(&conn->me\)", ""),),
)

PARTING_BLINDLY = Mutant(
    "removal: a socket parts while its own redirect is on its way",
    (Edit(r"(?<=tb_should_part\(conn, tp\)\)) &&\s+tb_alone\(conn, thread\)", ""),),
)

FOLLOWING_TOO_SOON = Mutant(
    "removal: a reader follows a peer that has not left",
    (Edit(r"tb_peers_parting\(conn\) == TB_PARTED", "tb_peers_parting(conn)"),),
)

LEAVING_BLINDLY = Mutant(
    "removal: a socket leaves while a redirect to it is on its way",
    (Edit(r" &&\n\t    tb_read32\(conn->peer\.psock \+ OFF_PSOCK_REFCNT\) != 1\)", " && 0)"),),
)

LEAVING_UNHEARD = Mutant(
    "removal: nobody hears that a socket has announced to leave",
    (Edit(r"\*count == conn->steps && !conn->wary", "1"),),
)

LEAVING_OPENLY = Mutant(
    "removal: redirects go on to a socket that has announced to leave",
    (Edit(r"tb_peers_parting\(conn\) >= TB_CLOSED", "0"),),
)

PEEKERS = Mutant(
    "peekers: to the bypass although the peer has not taken a byte",
    (Edit(r"if \(write_seq == conn->first\)", "if (0)"),),
)

STRICTNESS = Mutant(
    "loss: as much as elsewhere where TCP drops what passes sk_rcvbuf",
    (Edit(r"if \(TB_STRICT\) \{", "if (0) {"),),
)

SILENT_ORDER = Mutant(
    "order: to the bypass although TCP bytes lie unread at a non-blocking reader",
    (Edit(r"tb_read32\(sk \+ OFF_TCP_SOCK_COPIED_SEQ\) == seq", "1"),),
)

SILENT_WAKE_UP = Mutant(
    "wake-up: to the bypass although a non-blocking reader still sleeps on the TCP queue",
    (Edit(r"!tb_has_sleeper\(sk\) && !tb_busy\(conn\)", "1"),),
)
