# SPDX-License-Identifier: Apache-2.0
"""`estimate`: pairing, judging and counting, and where its figures come from."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cni_plugin import names, netconf, policy
from install.program.estimate import command, figures, sockets
from install.program.estimate.pairs import Connection, End, Judge, pair
from install.program.estimate.pods import Pod, planned
from install.program.estimate.sockets import Address, Buffers, Dump, Socket
from install.program.estimate.survey import Survey
from tests.unit.cases import ROOT

PROXY = 1337
BUFFERS = Buffers(131_072, 425_984)
CONF = netconf.parse({})
MESH = {names.SIDECAR_STATUS: "{}"}


def test_figures_are_the_benchmarks() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = re.findall(
        r"^\| Round trip of 64 B, (\w+), to TCP \|.*\|"
        r" (?:[\d.]+ \[(.*), (.*)\].*|not measured) \|.*$",
        text,
        re.MULTILINE,
    )
    assert [hop for hop, *_ in rows] == list(figures.ROUND_TRIPS)
    for hop, least, most in rows:
        found = figures.of(hop)
        if least:  # a ratio of medians, and the interval of the median of the ratios
            assert float(least) <= found.bypass_us / found.tcp_us <= float(most)


def test_the_documents_picture_promises_no_more_than_the_figures() -> None:
    """`python -m tests.pictures` makes it anew."""
    picture = (ROOT / "docs" / "img" / "estimate.svg").read_text()
    text = html.unescape(re.sub(r"<[^>]+>", "", picture)).replace("\N{NO-BREAK SPACE}", " ")
    assert "stay on this node: at least " in text
    found = dict(re.findall(r"In mode (full|proxy-only).*?: ([\d.]+) us less for each call", text))
    hops = {"full": tuple(figures.ROUND_TRIPS), "proxy-only": ("sidecars",)}
    assert found.keys() == hops.keys()
    for mode, saved in found.items():
        most = sum(figures.of(hop).saved_us for hop in hops[mode])
        assert float(saved) <= round(most, 1)


def pod(name: str, ip: str, annotations: dict[str, str] | None = None, **conf: object) -> Pod:
    described = policy.Pod("shop", name, "uid", MESH if annotations is None else annotations)
    return planned(netconf.parse(conf), described, f"/netns/{name}", frozenset({ip}))


_cookies = iter(range(1, 1000))


def socket(
    local: Address, peer: Address, *, uid: int = 1000, sent: int = 1000, received: int = 1000
) -> Socket:
    cookie = next(_cookies)
    return Socket(
        *(cookie, cookie, uid, "ESTABLISHED", local, peer, sent, received, 100, 100, 1448),
        *("cubic", "", BUFFERS.first, 16_384, 0, 0),
    )


def listener(address: str, port: int) -> Socket:
    return replace(socket((address, port), ("0.0.0.0", 0)), state="LISTEN")


def dump(*found: Socket) -> Dump:
    return Dump(list(found), BUFFERS)


CART, REVIEWS = pod("cart", "10.0.0.2"), pod("reviews", "10.0.0.3")


def mesh() -> dict[Pod, Dump]:
    """A call from cart to reviews on one node, as Istio's rules make it look."""
    return {
        CART: dump(
            listener("0.0.0.0", 15001),
            socket(("10.0.0.2", 40000), ("10.96.0.10", 80)),
            socket(("127.0.0.1", 15001), ("10.0.0.2", 40000), uid=PROXY),
            socket(("10.0.0.2", 41000), ("10.0.0.3", 8080), uid=PROXY),
        ),
        REVIEWS: dump(
            listener("0.0.0.0", 15006),
            listener("0.0.0.0", 8080),
            socket(("10.0.0.3", 15006), ("10.0.0.2", 41000), uid=PROXY),
            socket(("127.0.0.6", 42000), ("10.0.0.3", 8080), uid=PROXY),
            socket(("10.0.0.3", 8080), ("127.0.0.6", 42000)),
        ),
    }


def judge(dumps: dict[Pod, Dump], blocking: dict[int, bool] | None = None) -> Judge:
    listeners = [
        End(pod, each, False) for pod in dumps for each in dumps[pod].sockets if each.is_listener
    ]
    return Judge(dict.fromkeys(dumps, BUFFERS), listeners, blocking or {})


def reasons(dumps: dict[Pod, Dump], blocking: dict[int, bool] | None = None) -> dict[str, str]:
    """By hop."""
    judging = judge(dumps, blocking)
    return {each.hop: judging.reason(each) for each in pair(dumps)}


def test_the_three_hops_of_a_call() -> None:
    assert reasons(mesh()) == {"outbound": "", "sidecars": "", "inbound": ""}


def test_an_end_that_is_elsewhere() -> None:
    dumps = mesh()
    del dumps[REVIEWS]
    assert reasons(dumps) == {"outbound": "", "none": "the other end is not on this node"}
    (alone,) = [each for each in pair(dumps) if each.hop == "none"]
    assert alone.may_be_to_a_sidecar


def test_of_two_with_the_same_port_the_bytes_decide() -> None:
    """One port of a pod's may serve for connections to several destinations."""
    right = socket(("10.0.0.2", 40000), ("10.96.0.10", 80), sent=5000, received=70)
    wrong = socket(("10.0.0.2", 40000), ("10.96.0.11", 80), sent=1, received=2)
    server = socket(("127.0.0.1", 15001), ("10.0.0.2", 40000), uid=PROXY, sent=70, received=5000)
    for order in ((right, wrong), (wrong, right)):
        dumps = {CART: dump(listener("0.0.0.0", 15001), *order, server)}
        found = [each for each in pair(dumps) if each.server]
        assert [each.client and each.client.socket for each in found] == [right]


def test_loopback_addresses_do_not_lead_to_another_pod() -> None:
    dumps = {
        CART: dump(socket(("127.0.0.1", 5000), ("127.0.0.1", 8080))),
        REVIEWS: dump(
            listener("127.0.0.1", 8080), socket(("127.0.0.1", 8080), ("127.0.0.1", 5000))
        ),
    }
    assert {each.hop for each in pair(dumps)} == {"none"}


def changed(dumps: dict[Pod, Dump], place: Address, **change: object) -> dict[Pod, Dump]:
    return {
        pod: dump(
            *(replace(each, **change) if each.local == place else each for each in found.sockets)  # type: ignore[arg-type]
        )
        for pod, found in dumps.items()
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ulp": "tls"}, "kernel TLS"),
        ({"ulp": "mptcp"}, "MPTCP"),
        ({"ulp": "smc"}, "ULP smc"),
        ({"rcvbuf": 65_536}, "SO_RCVBUF"),
        ({"rcvbuf": BUFFERS.settable}, "SO_RCVBUF"),
        ({"rcvbuf": 6_291_456}, ""),  # it has grown by itself
        ({"segments": 3, "segments_received": 4}, ""),  # the client's count decides
    ],
)
def test_sockets_that_stay_on_tcp(change: dict[str, object], reason: str) -> None:
    found = reasons(changed(mesh(), ("10.0.0.3", 8080), **change))
    assert found == {"outbound": "", "sidecars": "", "inbound": reason}


def test_a_listener_passes_on_its_buffer_and_not_its_protocol() -> None:
    """A plain TCP connection to an MPTCP listener, as every Go server has, is plain TCP."""
    dumps = mesh()
    multipath = replace(listener("0.0.0.0", 8080), ulp="mptcp")
    dumps[REVIEWS].sockets[1] = multipath
    assert reasons(dumps)["inbound"] == ""
    dumps[REVIEWS].sockets[1] = replace(multipath, ulp="", rcvbuf=4_000_000)
    assert reasons(dumps)["inbound"] == "SO_RCVBUF"


def test_a_blocking_reader_and_one_that_cannot_be_seen() -> None:
    dumps = mesh()
    app = dumps[REVIEWS].sockets[-1]
    assert reasons(dumps, {app.inode: True})["inbound"] == "blocking reader"
    assert reasons(dumps, {app.inode: False})["inbound"] == ""
    assert reasons(dumps, {})["inbound"] == ""


def test_a_young_connection() -> None:
    young = changed(mesh(), ("127.0.0.6", 42000), segments=50, segments_received=43)
    assert reasons(young)["inbound"] == "fewer than 44 exchanges so far"


def test_pods_that_opted_out() -> None:
    for wishes, inbound, sidecars in (
        ({**MESH, names.ENABLED: "false"}, "not accelerated", "not accelerated"),
        ({**MESH, names.PROXY_ONLY: "true"}, "the pod is proxy-only", ""),
        ({**MESH, names.EXCLUDE_PORTS: "8080"}, "excluded port", "excluded port"),
    ):
        dumps = mesh()
        dumps[pod("reviews", "10.0.0.3", wishes)] = dumps.pop(REVIEWS)
        found = reasons(dumps)
        assert found["inbound"].startswith(inbound)
        assert found["sidecars"].startswith(sidecars)
        assert found["outbound"] == ""


def test_a_cluster_ip_towards_a_pod_without_a_sidecar() -> None:
    plain = pod("plain", "10.0.0.4", {names.ENABLED: "true"})
    for dialled, reason in (("10.96.0.10", "a ClusterIP"), ("10.0.0.4", "")):
        dumps = {
            CART: dump(socket(("10.0.0.2", 41000), (dialled, 8080), uid=PROXY)),
            plain: dump(listener("0.0.0.0", 8080), socket(("10.0.0.4", 8080), ("10.0.0.2", 41000))),
        }
        assert reasons(dumps)["direct"].startswith(reason)
        assert bool(reasons(dumps)["direct"]) == bool(reason)


def test_what_is_counted_is_what_was_sent_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    first, then = mesh(), mesh()
    for pod_of, found in then.items():  # the same sockets, later
        for number, each in enumerate(found.sockets):
            before = first[pod_of].sockets[number]
            grown = 0 if each.is_listener else 1
            found.sockets[number] = replace(
                before, sent=before.sent + 300 * grown, segments=before.segments + 3 * grown
            )
    stream = socket(("127.0.0.6", 43000), ("10.0.0.3", 8080), uid=PROXY, sent=10 * 16_384)
    then[REVIEWS].sockets.append(replace(stream, segments=114, mss=1448))
    looks = iter([first, then])
    survey = Survey([CART, REVIEWS], Path("/no/proc"))
    for _ in range(2):
        look = next(looks)
        monkeypatch.setattr(
            sockets, "dump", lambda path, look=look: look[CART if "cart" in path else REVIEWS]
        )
        survey.look()
    estimate = survey.result(seconds=2.0)
    for hop in ("outbound", "sidecars", "inbound"):
        assert estimate.total[hop].bypass.bytes == 600
        assert estimate.total[hop].bypass.messages == 6
        assert estimate.total[hop].bypass.connections == 2
    (alone,) = estimate.total["none"].tcp.values()
    assert alone.bytes == 10 * 16_384  # it came after the first look: all of it counts
    assert alone.messages == pytest.approx(10)
    # Half of the sidecars' calls are to somebody who is not here.
    assert estimate.calls == pytest.approx(13)
    assert estimate.calls_on_node == 3
    saved = 3 * sum(figures.of(hop).saved_us for hop in ("outbound", "sidecars", "inbound"))
    assert estimate.saved_cpu("full") == pytest.approx(saved / 1e6 / 2)
    between = figures.of("sidecars").saved_us
    assert estimate.saved_cpu("proxy-only") == pytest.approx(3 * between / 1e6 / 2)
    text = "\n".join(command.lines(estimate, "proxy-only"))
    assert "stay on this node: at least 23.1%" in text
    less = f"{3 / 13 * between:.1f} us less for each call"
    assert f"In mode proxy-only (this node's mode): {less}" in text
    document = command.as_json(estimate, None)
    assert document["total"]["inbound"]["bypass"]["bytes"] == 600


def test_a_sidecars_calls_to_plain_pods_of_this_node_are_not_between_sidecars(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, dumps = pod("plain", "10.0.0.4", {}), mesh()
    dumps[CART].sockets.append(socket(("10.0.0.2", 41001), ("10.0.0.4", 8080), uid=PROXY))
    server = socket(("10.0.0.4", 8080), ("10.0.0.2", 41001))
    dumps[plain] = dump(listener("0.0.0.0", 8080), server)
    survey = Survey(list(dumps), Path("/no/proc"))
    by_path = {each.netns: found for each, found in dumps.items()}
    monkeypatch.setattr(sockets, "dump", lambda path: replace(by_path[path], sockets=[]))
    survey.look()
    monkeypatch.setattr(sockets, "dump", by_path.__getitem__)
    survey.look()
    estimate = survey.result(seconds=1.0)
    assert estimate.total["direct"].all.messages > 0
    assert (estimate.calls, estimate.share_on_node) == (estimate.calls_on_node, 1.0)
    assert estimate.calls > 0


def test_a_quiet_node_divides_by_nothing() -> None:
    found = Survey([], Path("/proc")).result(1.0)
    assert found.share_on_node is None
    assert "No sidecar called another one." in "\n".join(command.lines(found, None))
    assert command.as_json(found, None)["sidecar_calls"]["share"] is None


def test_ulp_and_mapped_addresses() -> None:
    tls = bytes([8, 0, 1, 0, *b"tls\0", 5, 0, 2, 0, 1, 0, 0, 0])
    assert sockets._ulp(":".join(f"{each:02x}" for each in tls)) == "tls"
    assert sockets._ulp(None) == ""
    assert sockets._ulp("00:00:00:00") == ""
    assert sockets.plain("::ffff:10.0.0.2") == "10.0.0.2"
    assert sockets.plain("fd00::2") == "fd00::2"
    assert Connection(None, None, "none").ends == []
    assert CONF.mode == "auto"
