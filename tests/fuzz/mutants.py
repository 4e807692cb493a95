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


def _mutant(rule: str, *edits: tuple[str, str]) -> Mutant:
    return Mutant(rule, tuple(Edit(pattern, replacement) for pattern, replacement in edits))


# ---- One message: order.h, unread.h, edge.h ----

ORDER = _mutant(
    "one queue: to the bypass although TCP bytes lie unread",
    (r"tb_read32\(sk \+ OFF_TCP_SOCK_COPIED_SEQ\) ==\s+TB_OWN\([^)]+\)", "1"),
)
WAKE_UP = _mutant(
    "one queue: to the bypass although a reader sleeps on the TCP queue",
    (r"!tb_sleepers\(sk\) && tb_psock", "tb_psock"),
)
OPTIONS = _mutant(
    "readers: to the bypass although the peer has set options",
    (r" \|\|\s+tb_has_options\(conn->peer\.sk\)\)", ")"),
)
RETURN = _mutant(
    "one queue: to TCP although bypassed bytes lie unread",
    (r"is_empty = tb_is_empty\(conn->there\.psock\);", "is_empty = 1;"),
)
OVERTAKING = _mutant(
    "one queue: a message by TCP overtakes another thread's redirect",
    (r"return refs == 2 \|\| refs == 2 \+ [^;]+;", "return 1;"),
)
SILENCE = _mutant(
    "edges: without a joiner the bypass goes on",
    (r"if \(tb_is_joiner_silent\(now\)\)\n\t\treturn TB_REASON_WAITING;", ""),
)
SLEEPERS = _mutant(
    "one queue: a thread asleep in recv keeps its end's messages on the bypass",
    (r"return refs == 2 \|\| refs == 2 \+ [^;]+;", "return refs == 2;"),
)
PAUSE = _mutant(
    "pause: the bypass goes on",
    (r"if \(tb_is_paused\(conn\)\)\n\t\treturn TB_REASON_PAUSED;", ""),
)
LOCK = _mutant(
    "lock: a redirect waits for an application's lock",
    (r"if \(!conn->peer\.is_proxy && tb_is_owned\(conn->peer\.sk\)\)", "if (0)"),
)
HALF_CLOSED = _mutant(
    "half-closed: bypassed bytes after the first FIN",
    (r"if \(TB_OWN\(__u8, tp, OFF_SOCK_STATE\) != [^;]+ED\)\n", "if (0)\n"),
)
CONNTRACK = _mutant(
    "conntrack: no message goes by TCP",
    (r"return tb_has_passed\(NS_PER_S, conn->tcp_at, now\) &&", "return 0 &&"),
)
CORK = _mutant(
    "cork: bypassed bytes although they are to be held back",
    (r"if \(TB_OWN\(__u8, tp, OFF_TCP_SOCK_NONAGLE\) & [^)]+\)", "if (0)"),
)
_WAITS_FOR_ACK = r"tb_waits_for_ack\(conn->peer\.sk\)"
_AT_ONCE = (rf"{_WAITS_FOR_ACK} \|\|", "")
NAGLE = _mutant(
    "Nagle: bypassed bytes to an end that waits for an acknowledgement",
    (rf" \|\| {_WAITS_FOR_ACK}\)", ")"),
    _AT_ONCE,
)
NAGLE_WAITS = _mutant(
    "Nagle: bypassed bytes behind others, to an end that waits for an acknowledgement",
    _AT_ONCE,
)
NAGLE_STAYS = _mutant(
    "Nagle: an end that does not wait for answers stays",
    (r"reason != TB_REASON_PAUSED && tb_waits_for_ack\(conn->me\.sk\)", "0"),
)
NAGLE_PIECES = _mutant(
    "Nagle: a message goes in the pieces in which the kernel has allocated it",
    (r"bpf_msg_pull_data\(msg, 0, msg->size, 0\)", "0"),
)
NAGLE_TWICE = _mutant(
    "Nagle: two ends without TCP_NODELAY join",
    (r"!tb_has_nodelay\(sk\) && tb_has_peer\(conn\) && [^)]+\)", "0"),
)
BLOCKING = _mutant(
    "readers: bypassed bytes to a reader that may sleep in recv",
    (r"if \(!tb_is_nonblocking\(conn->there\.file\)\)", "if (0)"),
)
OWN_ULP = _mutant(
    "readers: bypassed plaintext of a sender with kTLS",
    (r"TB_OWN\(__u64, tp, OFF_ICSK_ULP_OPS\) \|\| ", ""),
)
PEERS_ULP = _mutant(
    "readers: bypassed bytes past a reader's kTLS",
    (r" \|\|\n\t    tb_read64\(conn->peer\.sk \+ OFF_SOCK_PROT\) != [^\n]+\)\n", ")\n"),
)
READERS = _mutant(
    "readers: a member that turns blocking stays",
    (r"if \(file && !tb_is_nonblocking\(file\)\)", "if (0)"),
)
READERS_EVER = _mutant(
    "readers: blocking readers join",
    (r"if \(file && !tb_is_nonblocking\(file\)\)", "if (0)"),
    (r"if \(!tb_is_nonblocking\(conn->there\.file\)\)", "if (0)"),
)
SHORT_SENDS = _mutant(
    "short sends: a thread that goes on behind a hole is not noticed",
    (r"return call != SENDMMSG &&[^;]+;", "return 1;"),
)
URGENT = _mutant(
    "urgent: an urgent byte is redirected", (r"if \(\(flags & MSG_OOB\)[^\n]+\n\t\treturn 0;", "")
)
BOUND = _mutant(
    "bound: nothing stops a redirecting sender",
    (r"if \(unread > tb_bound\(&conn->peer\)\)", "if (0)"),
    (r"return conn->run > TB_STREAM \? TB_REASON_STREAM : TB_REASON_NONE;", "return 0;"),
)
STREAM = _mutant(
    "bound: a stream that is never answered stays on the bypass",
    (r"return conn->run > TB_STREAM \? TB_REASON_STREAM : TB_REASON_NONE;", "return 0;"),
)
MEMORY = _mutant(
    "memory: nothing is left of the limit of the reader's container",
    (r"if \(unread > tb_room\(conn->peer\.sk\)\)", "if (0)"),
)
MEMORY_OF_POD = _mutant(
    "memory: nor of the limit of the pod", (r"#define TB_LEVELS 4", "#define TB_LEVELS 1")
)
PRESSURE = _mutant(
    "memory: redirects while the kernel's memory for TCP is short",
    (r"if \(tb_is_memory_short\(conn->there\.prot\)\)", "if (0)"),
)
FRESH_EDGE = _mutant(
    "edges: no fresh edge",
    (r"return is_empty && has_more && !is_owned;", "return 0;"),
)
EDGE_UNASKED = _mutant(
    "edges: a sender does not ask for a pass",
    (
        r"if \(conn->path == TB_PATH_BEHIND\)\n"
        r"\t\ttb_ring_for_edge\(conn->peer\.pod_id\);\n\telse if",
        "if",
    ),
)
EDGE_ONCE = _mutant(
    "edges: the pass does not ask for another one",
    (r"\ttb_ring_for_edge\(conn->me\.pod_id\);\n\treturn is_empty", "\t\t;\n\treturn is_empty"),
)
EDGE_TOO_EARLY = _mutant(
    "edges: nor while a redirect is on its way",
    (r"may_come = [^;]+;", "may_come = 0;"),
)
EDGE_AFTER_LEAVING = _mutant(
    "edges: none for a reader that has left",
    (
        r"if \(may_be_behind && tb_find_edge\(conn, sk\)\)",
        "if (tb_membership(conn->state) != TB_OUT && tb_find_edge(conn, sk))",
    ),
)
EDGE_OF_THE_CLOSED = _mutant(
    "edges: none behind a sender that has closed",
    (
        r"return conn->at\.psock != 0;\n\}\n\n/\* TCP bytes may",
        "return 0;\n}\n\n/* TCP bytes may",
    ),
)
EDGE_OF_THE_LEFT = _mutant(
    "edges: none behind a sender that has closed, once its reader has left",
    (r"return conn->at\.psock != 0;", "return tb_membership(conn->state) != TB_OUT;"),
)
EDGE_FORGOTTEN = _mutant(
    "edges: the sender forgets before its peer has read on",
    (r"return \(int\)\(tb_read32\([^;]+> 0;", "return 1;"),
)
EDGE_UNNOTED = _mutant(
    "edges: a send that began before the socket joined is not noted",
    (r"if \(conn->path != TB_PATH_BYPASS \|\|\s+\(tcp_state[^;]+\)\n", "if (1)\n"),
)

# ---- Joining ----

JOINS_UNSERVED = _mutant(
    "joining: while there is no joiner", (r"!tb_is_joiner_silent\(now\) &&", "1 &&")
)
JOINS_OWNED = _mutant(
    "joining: while a thread is inside a call", (r"!tb_is_owned\(sk\) &&\n", "1 &&\n")
)
JOINS_SLEEPER = _mutant(
    "joining: while a reader sleeps",
    (r"!tb_sleepers\(sk\) && tb_is_same_connection", "tb_is_same_connection"),
)
JOINS_STRANGER = _mutant(
    "identity: the numbers are not looked at again", (r" && tb_is_same_connection\(conn, sk\)", "")
)
JOINS_ALONE = _mutant(
    "identity: the ends need not name each other",
    (r" &&\n\t       TB_PEERS\(__u64, conn, peer\.id\) == conn->me\.id;", ";"),
)
JOINS_OCCUPIED = _mutant(
    "joining: beside another program's sockmap",
    (r"if \(tb_read64\(sk \+ OFF_SOCK_USER_DATA\)\)", "if (0)"),
)
# ---- Leaving, a condition each ----
#
# One has no mutant here: that the third visit finds no thread inside a call. The number of sends
# says the same, but for a store that another CPU does not see yet.

LEAVES_OPENLY = _mutant(
    "leaving: redirects go on into its empty queue",
    (r"\(is_empty \|\| tb_is_gone\(conn, state\)\)", "tb_is_gone(conn, state)"),
)
LEAVES_PAUSED = _mutant(
    "leaving: the pause that goes with it hides it",
    (
        r"\tif \(state != conn->peer_state \|\|",
        "\tif (tb_is_paused(conn))\n\t\treturn TB_REASON_PAUSED;\n"
        "\tif (state != conn->peer_state ||",
    ),
)
LEAVES_UNREAD = _mutant(
    "leaving: with bypassed bytes unread", (r"return tb_is_empty\(conn->at\.psock\) &&", "return")
)
LEAVES_UNHEARD = _mutant(
    "leaving: with what it has bypassed unread",
    (r"\(!tb_is_peer_in\(conn\) \|\| tb_is_empty\([^;]+;", "1;"),
)
LEAVES_BLINDLY = _mutant(
    "leaving: while a thread of the peer's is inside a call",
    (r"tb_is_at_rest\(conn->peer\.conn, [^;]+;", "1);"),
)
LEAVES_OWN = _mutant(
    "leaving: while a thread of its own is inside a call",
    (r"return tb_is_at_rest\(conn->me\.conn, conn->me\.sk\) &&", "return"),
)
LEAVES_BEHIND = _mutant(
    "leaving: while a redirect of the peer's rests that TCP has overtaken",
    (r"TB_OF_END\(__u32, path\) == TB_PATH_TCP", "TB_OF_END(__u32, path) != TB_PATH_BYPASS"),
)
LEAVES_UNDECIDED = _mutant(
    "leaving: while a send of the peer's is being decided upon",
    (r"if \(TB_OF_END\(__u32, decided\) != TB_OF_END\(__u32, sent\)\)", "if (0)"),
)
LEAVES_AWAKE = _mutant(
    "leaving: only when no thread sleeps",
    (r"return refs == 1 \|\| \([^;]+;", "return refs == 1;"),
)
LEAVES_FOR_A_WHILE = _mutant(
    "leaving: it comes back with a thread asleep on its former queue",
    (r"if \(tb_sleepers\(conn->me\.sk\) && !conn->refused\)", "if (0)"),
)
LEAVES_AT_ONCE = _mutant(
    "leaving: in one visit after the first",
    (r"if \(conn->noted != begun\) \{", "if (0) {"),
)
LEAVES_UNCOUNTED = _mutant(
    "leaving: sends are counted before the last looks",
    (r" && tb_begun\(conn\) == begun;", ";"),
)
LEAVES_OWN_UNCOUNTED = _mutant(
    "leaving: the sends of the peer alone are counted",
    (r"\(__u32\)\(\*[^;]+;", "peers;"),
    (r"tb_is_empty\(TB_PEERS\(__u64, conn, at\.psock\)\)", "1"),
)

# ---- Identity ----

# Addresses alone are not enough to go wrong: the numbers are looked at once more at the join, and a
# stranger's do not fit when a direction goes to the bypass, and it does not name this end. So those
# walls go, too.
PEER_UNKNOWN = Edit(r"watched\) \+ 1 >= TB_MIN_EXCHANGES", "watched) + 1 > 0")
IDENTITY = Mutant(
    "identity: paired by addresses, not by sequence numbers",
    (
        *ORDER.edits,
        *JOINS_STRANGER.edits,
        *JOINS_ALONE.edits,
        Edit(r"(?<!dial\.)client_isn = [^;]+;", "client_isn = 0;", 2),
        Edit(r"server_isn = [^;]+;", "server_isn = 0;", 2),
        Edit(r"halves\.insert\(([^)]+)\) \?", "halves.update(&conn->half, &half) ?"),
        Edit(r"if \(half->server\.id\)", "if (0)"),
        Edit(r"half->client\.id != conn->me\.id \|\| ", ""),
        # The ends of a wrong pair are seldom ready together.
        Edit(r"\(TB_PEERS\(__u32, conn, exchanges\) >= TB_PEERS\(__u32, conn, wanted\) ", "(1 "),
        PEER_UNKNOWN,
    ),
)
REUSED_SOCKET = _mutant(
    "identity: a socket that disconnected keeps its bypass queue",
    (r"if \(id\)\n\t\tsockhash\.delete\(&id\);", ""),
)
