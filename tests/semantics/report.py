"""The findings as a table for people, as JSON, and as docs/limits.md."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.semantics.runner import BYPASS, DIRECTIONS, PAUSED, Difference, Finding, Run, troubles
from tests.semantics.scenario import Limit

INTRODUCTION = """\
# What an application can see

Written by `python -m tests.semantics --write docs/limits.md`; do not edit. {count} behaviours of a
TCP socket were run over plain TCP, over the bypass, and over the bypass while it was paused (both
sockets in the sockhash, every byte by TCP), each with the client and with the server as the sender,
on Linux {kernel}. The table has those that came out differently. Envoy as the receiver
uses none of them: towards a sidecar every difference below is without effect.

**How to opt out.** By port: the annotation `tcpip-bypass/exclude-ports: "3306,5432"` on the pod of
either end. By pod, all but the connections between two sidecars: `tcpip-bypass/proxy-only: "true"`.
By pod altogether: `tcpip-bypass/enabled: "false"`. All three at the next start of the pod; at once
and for the whole node: `tcpip-bypass-node pause` (but then sockets stay in the sockhash until they
are closed: what is marked "paused" stays as it is).

| behaviour: over TCP → here | what it means | what to do |
| --- | --- | --- |
"""

UNSHOWN = """\

## What a run cannot show

- **Several threads that write to one socket at the same moment, without a lock of their own.** TCP
  keeps their messages whole as long as the send buffer has room, and so does the bypass. When a
  direction leaves the bypass (a receiver that has fallen behind, `pause`), a message that is still
  on its way could be overtaken; the program waits that out for a bounded time, so that only a
  thread that is held up between two instructions for all of it is left to chance.
- **An edge-triggered reader that takes a short read for the end of what is there** (epoll(7) allows
  it), and that does not look at its socket while more than its receive buffer and 512 KB arrive
  (1.2 MB inside a pod; 64 KB where its container is short of memory, and on kernels that drop what
  passes the receive buffer, see below): what came after by TCP can lie there until the next byte
  comes. The same at `pause` and `unload` with as much unread, and between two pods without
  sidecars, in a moment in which the reader's own thread is inside send. nginx with large uploads is
  such a reader: exclude its port, or proxy-only. So it is with a reader that peeks (MSG_PEEK) until
  so much is there, a sidecar's listener filters among them, which are left at the bound.
- **A receive buffer that cannot grow** while bypassed bytes lie in it: then TCP drops what comes
  behind them, and it comes again by a timer, 0.2 s later or, behind a reader that rests, after
  about as long again. Where it never can, nothing bypasses, for good and in either direction: once
  an end has set SO_RCVBUF, with `net.ipv4.tcp_shrink_window`, and with a `net.ipv4.tcp_rmem` of
  less than 1.2 MB (a sidecar's: 256 KB). What is left: SO_RCVBUF that is set while anything is
  unread; a node above the first number of `net.ipv4.tcp_mem`, or a container whose memory is
  reclaimed all the time; and applications of two pods without sidecars, inside a read with more
  than 150 KB unread. Kernels that drop whatever passes the receive buffer (6.17, 6.18 before
  6.18.17, 6.19 before 6.19.7) bypass what a quarter of it holds, 32 KB as it begins, and 32 KB more
  towards an application; less where TCP has offered a large window.
- **A container near its memory limit** (cgroup2's `memory.max`, its own or that of one of three
  cgroups above it). Unread bytes count to it, bypassed or not, and over TCP up to the receive
  buffer (131 KB as it begins, later up to 6 MB and more) for each connection. Bypassed ones may be
  more on a new connection (1.2 MB), so each takes a 16th of what the limit leaves, beyond a reserve
  of a 16th of it or 32 MB, and 64 KB more where earlier bytes lie unread; half of the file cache
  that is not in use counts as free. A container without such room is on TCP (reason `memory`), a
  connection for good after 260,000 messages.
- **A node whose memory for TCP is used up** (the last number of `net.ipv4.tcp_mem`; a thousand
  stalled receivers do it on a machine of 24 GB, bypassed or not). TCP lets each connection send one
  more segment; a socket in a sockhash waits in send until there is memory, even to send by TCP.
  Below that, who does not read holds more than over TCP: on a new connection inside a pod up to
  5.9 MB and 3.9 over TCP, between two up to 0.7 MB and 0.1; where buffers have grown, up to 2.5 MB
  more.
- **Another sock_ops program on the same cgroup or above it.** The callbacks that a socket asks for
  are shared by all programs. Ours add those for RTT, state and header options to accelerated
  sockets, so the other is called as well; and when a stream leaves, those that nobody had asked
  for before are switched off, though the other may have asked since. Programs that write header
  options themselves are the ones to look at.
- **Two threads that read one stream at the same moment.** One can fall asleep on the TCP queue
  while bytes for it come by bypass, until the next byte by TCP or the end of the stream.
- **Kernel TLS switched on in the middle of a connection** (`TCP_ULP`, OpenSSL with `enable_ktls`):
  from then on its bytes go by TCP; bytes of the peer that lay unread at that moment are read as
  they were sent, undecrypted. A socket with kernel TLS before it is established is never bypassed.
  Linux 6.1, 6.12 and 7.2 refuse it on a bypassed connection (EINVAL), and OpenSSL then encrypts by
  itself; 6.17 and 6.18 allow it.
- **MSG_ZEROCOPY on Linux 5.10**, with SO_ZEROCOPY set after the connection was established: the
  bytes arrive, by TCP, and no completion comes.
- **SO_MAX_PACING_RATE** slows down packets: bypassed bytes are none.
- **BBR** inside a pod is Reno, as `ss -i` and TCP_CONGESTION show, unless the application has
  chosen it for the socket: there is no network to pace for. It comes back to a socket that streams
  small writes, within some hundreds of acknowledgements, to a paused one, and for a reader with
  SO_RCVLOWAT; also if the application has asked for Reno meanwhile. TCP_CC_INFO is Reno's: empty.
- **The congestion window** of a connection inside a pod is held at 16 packets or 512 KB once some
  of its bytes have gone by TCP (not where TCP paces them): `ss -i` and TCP_INFO show it, as
  `cwnd` and `ssthresh`. A reader that waits for more than that without reading it (MSG_PEEK,
  FIONREAD) may get it up to 40 ms late, and the 16 packets become 32, and so on up to 256, about as
  TCP's own window grows. One that waits for more than 256 small writes meets that 16 to 64 times;
  then the window is TCP's own again. (If 256 KB and more lie unread each time, beside the small
  writes, for which SO_RCVBUF must be large, it looks like a stream, and meets it again and again.)
  Nothing is held for a reader with SO_RCVLOWAT. With `net.ipv4.tcp_no_ssthresh_metrics_save=0`
  (the default is 1) the kernel remembers the `ssthresh` for later connections to the same address.
- **Time stamps, tcpdump and packet counters** do not see bypassed bytes: they never are packets.

## What is the same

"""


def print_table(findings: Sequence[Finding], runs: Sequence[Run]) -> None:
    """The differences and the troubles, for a terminal."""
    console = Console(width=None if Console().is_terminal else 160)
    table = Table("behaviour", "event", "over TCP", "here", "when", "documented")
    for finding in findings:
        for difference, when in by_event(finding):
            table.add_row(
                *(finding.scenario.title, difference.event),
                *(text(difference.plain), text(difference.found), when),
                "yes" if finding.scenario.limit else "[red]NO",
            )
    console.print(table)
    differing = sum(finding.differs for finding in findings)
    console.print(f"{len(findings)} behaviours, {differing} differ, {len(runs)} runs")
    for trouble in troubles(runs):
        console.print(f"[red]{trouble}")


def by_event(finding: Finding) -> list[tuple[Difference, str]]:
    """Each event that differs once, with the modes and directions in which it does."""
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for difference in finding.differences:
        key = (difference.event, text(difference.plain), text(difference.found))
        groups.setdefault(key, []).append(difference)
    return [(group[0], when(group)) for group in groups.values()]


def when(group: Sequence[Difference]) -> str:
    """In which modes, and in which direction when it is one only."""
    modes = [mode for mode in (BYPASS, PAUSED) if any(one.mode == mode for one in group)]
    directions = {one.direction for one in group}
    only = "" if directions == set(DIRECTIONS) else f", {directions.pop()}"
    return " and ".join(modes) + only


def text(value: Any) -> str:
    """A transcript's value for the eyes."""
    if value == "":
        return "0 bytes"
    if isinstance(value, list):
        return ", ".join(text(item) for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def as_json(findings: Sequence[Finding], runs: Sequence[Run]) -> str:
    """Everything, for machines: differences by scenario, troubles, and the kernel."""
    return json.dumps(
        {
            "kernel": platform.release(),
            "scenarios": len(findings),
            "runs": len(runs),
            "differing": {
                finding.scenario.name: {
                    "title": finding.scenario.title,
                    "documented": finding.scenario.limit is not None,
                    "events": [
                        {
                            "event": difference.event,
                            "plain": difference.plain,
                            "found": difference.found,
                            "when": when_,
                        }
                        for difference, when_ in by_event(finding)
                    ],
                }
                for finding in findings
                if finding.differs
            },
            "undocumented": undocumented(findings),
            "vanished": vanished(findings),
            "troubles": troubles(runs),
        },
        indent=1,
    )


def undocumented(findings: Sequence[Finding]) -> list[str]:
    """Scenarios that differ and have no entry in the table."""
    return [one.scenario.name for one in findings if one.differs and not one.scenario.limit]


def vanished(findings: Sequence[Finding]) -> list[str]:
    """Scenarios whose entry says that they differ on every kernel, and that do not."""
    return [
        one.scenario.name
        for one in findings
        if one.scenario.limit and one.scenario.limit.everywhere and not one.differs
    ]


def limits_page(findings: Sequence[Finding]) -> str:
    """docs/limits.md."""
    page = INTRODUCTION.format(count=len(findings), kernel=platform.release())
    by_limit: dict[Limit, list[Finding]] = {}
    for finding in findings:
        if finding.scenario.limit:
            by_limit.setdefault(finding.scenario.limit, []).append(finding)
    for limit, group in by_limit.items():
        seen = "<br>".join(cell(finding) for finding in group)
        page += f"| {seen} | {limit.means}. | {limit.do} |\n"
    page += UNSHOWN
    same = [one.scenario.title for one in findings if not one.scenario.limit]
    return page + "".join(f"- {title}\n" for title in same)


def cell(finding: Finding) -> str:
    """A behaviour and what came out: over TCP, then here."""
    rows = by_event(finding)
    if not rows:
        return f"**{finding.scenario.title}**: the same on this kernel"
    difference, modes = rows[0]
    came = f"{difference.event}: {text(difference.plain)} → {text(difference.found)}"
    paused = "" if PAUSED not in modes else ", also paused" if BYPASS in modes else ", paused only"
    return f"**{finding.scenario.title}**: {came}{paused}".replace("|", "\\|")
