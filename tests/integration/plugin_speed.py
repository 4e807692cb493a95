# SPDX-License-Identifier: Apache-2.0
"""How long a call of the frozen plugin takes: the kubelet waits for it, for every pod.

``python -m tests.integration.plugin_speed [RUNS]`` prints the table. A measurement, not a test:
what keeps the plugin fast is tested in tests/unit/test_start_up.py, by what each command imports.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

from tests.bed import cni, open_bed
from tests.bed.bed import REFERENCE_PLUGINS, Bed
from tests.integration import plugin_calls
from tests.integration.plugin_calls import Sandbox


@dataclass
class Times:
    """Milliseconds of each run."""

    clock: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def measure(self, call: Callable[[], object]) -> None:
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        call()
        self.clock.append((time.perf_counter() - started) * 1e3)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
        self.cpu.append(used * 1e3)


@contextmanager
def pod() -> Iterator[Sandbox]:
    with open_bed() as bed, plugin_calls.sandbox(bed, "speed") as made:
        yield made


def must(pod: Sandbox, command: str) -> None:
    assert pod.call(command).exit == 0


def bridge(bed: Bed, pod: Sandbox) -> tuple[Callable[[], object], Callable[[], object]]:
    """ADD and DEL of the reference bridge plugin for the same namespace."""
    chain = cni.Chain(
        "reference", [cni.bridge(bed.folder / "reference")], [REFERENCE_PLUGINS], bed.host
    )
    attachment = cni.Attachment(
        container_id="reference",
        netns=pod.netns,
        pod_namespace="shop",
        pod_name="cart",
        pod_uid=pod.uid,
        cgroup_path="/",
        annotations={},
        ifname="eth1",
    )
    return partial(chain.add, attachment), partial(chain.delete, attachment)


def measured(pod: Sandbox, runs: int) -> dict[str, Times]:
    """Each call in turn, ``runs`` times over."""
    other = replace(pod, annotations=())
    bridge_add, bridge_del = bridge(pod.bed, pod)
    calls: dict[str, Callable[[], object]] = {
        "python3 -I -S -c pass": partial(
            os.spawnl, os.P_WAIT, "/usr/bin/python3", "python3", "-I", "-S", "-c", "pass"
        ),
        "bridge ADD": bridge_add,
        "bridge DEL": bridge_del,
        "VERSION": partial(must, pod, "VERSION"),
        "ADD, other pod": partial(must, other, "ADD"),
        "DEL, other pod": partial(must, other, "DEL"),
        "ADD, mesh pod": partial(must, pod, "ADD"),
        "CHECK, mesh pod": partial(must, pod, "CHECK"),
        "DEL, mesh pod": partial(must, pod, "DEL"),
        "STATUS": partial(must, pod, "STATUS"),
    }
    times = {name: Times() for name in calls}
    for call in calls.values():  # once unmeasured: caches, and the configuration's validation
        call()
    for _ in range(runs):
        for name, call in calls.items():
            times[name].measure(call)
    return times


def main(runs: int) -> None:
    with pod() as made:
        times = measured(made, runs)
    print(f"{runs} runs in turn; milliseconds: median on the clock, its 90th percentile, CPU")
    for name, each in times.items():
        median, cpu = statistics.median(each.clock), statistics.median(each.cpu)
        p90 = statistics.quantiles(each.clock, n=10)[-1]
        print(f"{name:22} {median:7.1f} {p90:7.1f} {cpu:7.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
