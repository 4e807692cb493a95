# SPDX-License-Identifier: Apache-2.0
"""A generation is removed while a reader rests with bytes of both kinds unread."""

from __future__ import annotations

import os
import select
from contextlib import closing, nullcontext
from pathlib import Path

from bpf.loader import Programs
from cni_plugin import cgroup
from install.program import leaving
from install.program.generations import Generations
from install.program.passes import OWN_CGROUP, repeated
from install.program.probes import PART, heard_by_edges
from tests.bed import open_bed
from tests.fuzz.cases import Ends, edges_of
from tests.integration.traffic_pods import eventually
from tests.light import LIMITS, LightPod, accelerated

MESSAGE = 8_000  # bytes, no multiple of PART


def rest(pod: LightPod, ready: int, go: int) -> bool:
    """Sends until bytes go by TCP behind others, and reads once told to. Was each byte heard?"""
    ends = Ends(pod)
    edges = edges_of(ends.server)
    sent = 0
    while "backlog" not in pod.total().tcp_messages:
        sent += ends.client.send(bytes(MESSAGE))
    edges.poll()  # its edge is taken
    os.write(ready, b"!")
    os.read(go, 1)
    heard = got = len(ends.server.recv(PART))
    while got == PART:
        got = len(ends.server.recv(PART))
        heard += got
    return heard < sent and heard + heard_by_edges(edges, ends.server, sent - heard) == sent


def left_behind() -> set[str]:
    """Processes for passes."""
    mount = cgroup.mount()
    assert mount is not None
    procs: Path = mount / OWN_CGROUP / "cgroup.procs"
    return set(procs.read_text().split()) if procs.exists() else set()


def test_a_reader_that_rests_outlives_the_pins() -> None:
    before = left_behind()
    with open_bed() as bed, closing(Programs(LIMITS)) as programs:
        generation = Generations(bed.node.bpffs).publish(programs)
        with accelerated(programs, passes=False) as pod:
            (ready, is_ready), (go, going) = os.pipe(), os.pipe()
            child = os.fork()
            if not child:
                try:
                    pod.enter()
                    os._exit(0 if rest(pod, is_ready, go) else 1)
                finally:
                    os._exit(2)
            with repeated(pod.visit, 0.004):
                assert select.select([ready], [], [], 20)[0]
            assert not leaving.empty(generation, [pod.folder], patience_s=0.3)
            leaving.stay_behind(generation, [pod.folder], nullcontext)
            generation.remove()
            os.write(going, b"!")
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == 0
            for fd in (ready, is_ready, go, going):
                os.close(fd)
    assert eventually(lambda: left_behind() <= before)
