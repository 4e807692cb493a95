# SPDX-License-Identifier: Apache-2.0
"""Suite: real programs in the mode that `auto` decides on this kernel, each byte checked.

They are those that a kernel decides: FIONREAD (nginx, Java), splice, at once and late (Go,
HAProxy), MPTCP's fallback (a Go server), readers that block (Java), and an event loop that needs
none of these (Node).
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from bpf import bpfsys, pins
from cni_plugin import names
from install.program import passes
from install.program.generations import Generations
from tests.apps import bed, tools
from tests.apps.application import Application
from tests.apps.bed import AppNode
from tests.apps.place import HopName
from tests.apps.registry import APPLICATIONS
from tests.bed.pairs import Bytes

NAMES = (
    *("nginx-proxy", "node", "go", "java", "java-blocking", "java-ready"),
    *("haproxy-splice-auto", "go-copy-header"),
    *("go-copy", "haproxy-splice-late"),  # their pods have been seen to splice by then
)
HOPS: tuple[HopName, ...] = ("outbound", "inbound")
BYPASS_WITHIN_S = 120  # of an emulated CPU
PASS_S = 0.1
BODY = 50_000_000
SMALL = range(100, 1100, 100)  # bytes of answers, at least 160, before a body
LOAD_S = 25.0
TRANSFER_S = 300  # for the bodies of one connection, down and up


@dataclass(frozen=True)
class Found:
    """One application on one hop. error: what was wrong; empty: nothing."""

    name: str
    hop: str
    error: str
    bypassed_bytes: int


@contextmanager
def passing(node: AppNode) -> Iterator[None]:
    """Passes over the meshes' pods all the time: the joiner's own rarely pay on an emulated CPU."""
    current = Generations(node.bed.node.bpffs).current()
    assert current is not None
    over = threading.Event()
    pairs = [pods.mesh for pods in node.pods.values()]
    pods = [pod for pair in pairs for pod in (pair.client, pair.server)]

    def go_on(visit: int) -> None:
        while not over.wait(PASS_S):
            for pod in pods:
                with suppress(BlockingIOError):  # the joiner's are at it
                    passes.visit_pod(visit, pod.cgroup)

    with bpfsys.closing(bpfsys.obj_get(str(current.folder / pins.VISIT))) as visit:
        thread = threading.Thread(target=go_on, args=(visit,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextmanager
def opened() -> Iterator[AppNode]:
    """The node in mode `auto`; its sockets join soon."""
    with bed.opened({"auto": ("bypass",)}) as nodes, passing(nodes["auto"]):
        yield nodes["auto"]


def checked(node: AppNode, application: Application, hop: HopName, mode: str) -> Found:
    """Runs one application on one hop and compares every byte."""
    error, bypassed = "", 0
    must_bypass = mode == "full" and application.may_bypass
    try:
        with bed.served(node, application, hop, "bypass") as where:
            before = bed.total(node, where.pair).bypassed
            bed.check(node, application, where, must_bypass=must_bypass, within_s=BYPASS_WITHIN_S)
            bypassed = bed.total(node, where.pair).bypassed - before
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}; {joining(node)}"
    return Found(application.name, hop, error, bypassed)


def joining(node: AppNode) -> str:
    """How joining fares: the joiner's own numbers, the generation's flags, why not, by hop."""
    current = Generations(node.bed.node.bpffs).current()
    pods = [
        (pod["name"], hop, found["connections"], found["tcp_messages"])
        for pod in node.bed.node.status()["pods"]
        for hop, found in pod["hops"].items()
    ]
    joiner = (node.bed.node.state_dir / names.JOINER_JSON).read_text()
    return f"{joiner}, flags {current.flags() if current else None}, {pods}"


def share(node: AppNode, application: Application, hop: HopName) -> float:
    """Of the bytes of a connection that has joined, the part that bypasses, 0 to 1."""
    with bed.served(node, application, hop, "bypass") as where, ThreadPoolExecutor(1) as pool:
        before = bed.counted(node, where.pair)[hop]
        load = pool.submit(next(iter(application.loads.values())), where, LOAD_S)
        while not load.done() and bed.counted(node, where.pair)[hop].bypassed == before.bypassed:
            time.sleep(0.1)
        time.sleep(1)
        before = bed.counted(node, where.pair)[hop]
        time.sleep(5)
        after = bed.counted(node, where.pair)[hop]
        load.result()
    return Bytes(after.bypassed - before.bypassed, after.by_tcp - before.by_tcp).share


def applications(node: AppNode, mode: str) -> dict[str, object]:
    """Every application on both hops inside a pod."""
    # First: an application's pod that has spliced joins no more.
    share_of_go = share(node, APPLICATIONS["go"], "inbound") if mode == "full" else None
    found = []
    for application in map(APPLICATIONS.__getitem__, NAMES):
        for hop in HOPS:
            found.append(checked(node, application, hop, mode))
            print(found[-1], file=sys.stderr)
    return {"mode": mode, "found": [asdict(each) for each in found], "go_share": share_of_go}


def transfers(node: AppNode, mode: str, count: int) -> dict[str, object]:
    """So many bodies of 50 MB down and up through nginx's proxy_pass; all compared.

    Each two have an nginx and connections of their own, which have joined before: nginx asks
    FIONREAD of members.
    """
    errors, right, bypassed = list[str](), 0, 0
    for _ in range(count // 2):
        start = time.monotonic()
        with bed.served(node, APPLICATIONS["nginx-proxy"], "inbound", "bypass") as where:
            before = bed.counted(node, where.pair)
            argv = tools.CLIENTS["http.client"](where.front.url, "check", *SMALL, f"then={BODY}")
            try:
                where.front.client.run(argv, timeout_s=TRANSFER_S)
                right += 2
            except Exception as failure:
                errors.append(f"{type(failure).__name__}: {failure}")
            after = bed.counted(node, where.pair)
        by_hop = {hop: after[hop].bypassed - before[hop].bypassed for hop in HOPS}
        if mode == "full" and not all(by_hop.values()):
            errors.append(f"a connection has not joined: {by_hop} bytes bypassed")
        bypassed += sum(by_hop.values())
        print(by_hop, f"{time.monotonic() - start:.1f} s", errors[-1:], file=sys.stderr)
    return {"mode": mode, "right": right, "errors": errors, "bypassed_bytes": bypassed}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.apps", description=__doc__)
    parser.add_argument(
        "--transfers", type=int, default=0, metavar="N", help="by nginx, only these"
    )
    chosen = parser.parse_args()
    with opened() as node:
        mode, count = bed.mode_of_kernel(node), chosen.transfers
        found = transfers(node, mode, count) if count else applications(node, mode)
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
