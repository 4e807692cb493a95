# SPDX-License-Identifier: Apache-2.0
"""What grows with the number of pods on a node, and with the number of connections.

Pods: how long ADD takes, what the kernel holds for them, and what a round trip costs while they are
there. Connections: the same beside live, silent ones.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bpf import bpfsys
from tests.bed import Bed, bpf_objects, cgroups, ends, netns, pairs, pingpong
from tests.bed.pairs import Pair
from tests.bed.pingpong import Hop
from tests.bench import hops, machine
from tests.bench.bench import Bench, Effort
from tests.integration import plugin_calls
from tests.integration.plugin_calls import Sandbox
from tests.integration.plugin_speed import Times

SOURCE = Path(__file__).with_name("silent.c")
SILENT_PORT, SILENT_PORTS = 9000, 8
PORT_RANGE = "20000 65000"  # above the ports listened on here
AT_ONCE = 2  # ADDs while pods are being made


@dataclass(frozen=True)
class Plan:
    """How much to measure; both numbers are of what is there beside what is measured."""

    pods: tuple[int, ...]
    adds: int
    connections: tuple[int, ...]
    rounds: int
    pairs: int


PLANS: dict[Effort, Plan] = {
    "full": Plan((0, 100, 1_000), 10, (1, 10_000, 100_000), 10_000, 7),
    "quick": Plan((0, 10), 5, (1, 1_000), 3_000, 3),
    "smoke": Plan((0, 2), 1, (1, 10), 50, 1),
}


def run(bench: Bench) -> None:
    """Measure everything that the plan says."""
    plan = PLANS[bench.effort]
    with bench.bed() as bed, pairs.pairs(bed) as both:
        program = ends.compiled(pingpong.SOURCE, bed.folder)
        round_trips = partial(_round_trips, bench, plan, both, program)
        _pods(bench, plan, bed, round_trips)
        _connections(bench, plan, bed, both, round_trips)
        bench.keep_counters(bed, both[1])


def _round_trips(
    bench: Bench, plan: Plan, both: tuple[Pair, Pair], program: Path, case: str
) -> None:
    """64 bytes there and back from the sidecar to the application, over TCP and bypassed."""
    with ExitStack() as stack:
        ways = [(pair, pingpong.hop("inbound", pair.client, pair.server)) for pair in both]
        for _, hop in ways:
            stack.enter_context(pingpong.serving(program, hop, bench.cpu))
        for number, (pair, hop) in pairs.alternated(ways, plan.pairs):
            joins = pair.kind == "bypass"
            trips = pingpong.measure(program, hop, bench.cpu, rounds=plan.rounds, joins=joins)
            bench.record(case, pair.kind, number, hops.values(trips))


def _pods(bench: Bench, plan: Plan, bed: Bed, round_trips: Callable[[str], None]) -> None:
    with plugin_calls.sandbox(bed, "probe") as probe, ExitStack() as stack:
        attached = 0
        for level in plan.pods:
            made = [stack.enter_context(_sandbox(bed, each)) for each in range(attached, level)]
            before = machine.kernel_memory()
            _add(made)
            grown = machine.kernel_memory() - before
            attached = level
            case = f"pods/{level}"
            bench.record(case, "memory", 0, {"map_bytes": float(_map_bytes(bed))})
            if made:
                bench.record(case, "memory", 1, {"bytes_per_pod": grown / len(made)})
            _time_calls(bench, plan, case, probe)
            round_trips(case)
            bench.tell(case, "add_ms", "median_us", "joined_ms")
        _must(probe, "GC")  # none of the attachments is valid any more


@contextmanager
def _sandbox(bed: Bed, number: int) -> Iterator[Sandbox]:
    """What ADD asks for, and no more: a cgroup, a namespace, an address in prevResult."""
    uid = f"silent{number}"
    with (
        cgroups.made(bed.cgroup / "kubepods" / f"pod{uid}") as cgroup,
        netns.created(f"{bed.name}-{uid}") as namespace,
    ):
        ip = f"10.{250 + (number >> 16)}.{number >> 8 & 255}.{number & 255}"
        yield Sandbox(bed, f"{uid}-0", uid, cgroup, namespace, ip=ip)


def _add(sandboxes: list[Sandbox]) -> None:
    for first in range(0, len(sandboxes), AT_ONCE):
        calls = [each.start("ADD") for each in sandboxes[first : first + AT_ONCE]]
        for call in calls:
            out, said = call.communicate(timeout=plugin_calls.TIMEOUT_S)
            if call.returncode != 0:
                raise RuntimeError(f"ADD failed: {out}{said}")


def _must(sandbox: Sandbox, command: str) -> None:
    answer = sandbox.call(command)
    if answer.exit != 0:
        raise RuntimeError(f"{command} failed: {answer.stdout}{answer.stderr}")


def _time_calls(bench: Bench, plan: Plan, case: str, probe: Sandbox) -> None:
    """ADD and DEL of one more pod, and VERSION, which knows of no pods, for comparison."""
    for number in range(-1, plan.adds):  # the first one warms up
        values = {}
        for command in ("VERSION", "ADD", "DEL"):
            times = Times()
            times.measure(partial(_must, probe, command))
            values[f"{command.lower()}_ms"] = times.clock[0]
            values[f"{command.lower()}_cpu_ms"] = times.cpu[0]
        if number >= 0:
            bench.record(case, "bypass", number, values)


def _map_bytes(bed: Bed) -> int:
    """Memory of all maps that the loaded programs use, as the kernel accounts for it."""
    total = 0
    for found in bpf_objects.pinned(bed.node.bpffs):
        if found.kind == "map":
            with bpfsys.closing(bpfsys.map_open(found.id)) as fd:
                for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
                    name, _, value = line.partition(":")
                    total += int(value) if name == "memlock" else 0
    return total


def _connections(
    bench: Bench,
    plan: Plan,
    bed: Bed,
    both: tuple[Pair, Pair],
    round_trips: Callable[[str], None],
) -> None:
    program = ends.compiled(SOURCE, bed.folder)
    with ExitStack() as stack:
        held = {pair.kind: stack.enter_context(_silent(program, pair)) for pair in both}
        live = 0
        for level in plan.connections:
            case = f"connections/{level}"
            for kind, connections in held.items():
                before = machine.kernel_memory()
                connections.grow(level)
                grown = machine.kernel_memory() - before
                if live:  # not for the first few, which drown in what else happens
                    values = {"bytes_per_connection": grown / (level - live)}
                    bench.record(f"{case}/memory", kind, 0, values)
            live = level
            round_trips(case)
            bench.tell(case, "median_us", "joined_ms")
            bench.tell(f"{case}/memory", "bytes_per_connection")


@dataclass(frozen=True)
class Connections:
    """Connections from a pod's sidecar to its application; see silent.c."""

    holder: subprocess.Popen[str]
    pair: Pair

    def grow(self, wanted: int) -> None:
        """Have so many live, each of which has exchanged a byte."""
        stdin, stdout = self.holder.stdin, self.holder.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{wanted}\n")
        stdin.flush()
        if stdout.readline() != f"{wanted}\n":
            raise RuntimeError(f"no {wanted} connections live:\n{self.pair.server.logs()}")


@contextmanager
def _silent(program: Path, pair: Pair) -> Iterator[Connections]:
    """None yet; they end on leaving."""
    hop = replace(
        pingpong.hop("inbound", pair.client, pair.server), port=SILENT_PORT, listen_port=SILENT_PORT
    )
    with pair.server.netns.entered():
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(PORT_RANGE)
    with ends.serving(program, hop, "-", SILENT_PORTS):
        holder = _holder(program, hop)
        try:
            yield Connections(holder, pair)
        finally:
            holder.kill()
            holder.wait()


def _holder(program: Path, hop: Hop) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return hop.asker.spawn(
        [program, "hold", hop.source, hop.destination, str(hop.port), str(SILENT_PORTS)],
        container=hop.asker_container,
        stdin=pipe,
        stdout=pipe,
    )
