# SPDX-License-Identifier: Apache-2.0
"""The whole mesh: a load generator, two Envoys and nginx, everything on one CPU.

Closed loop: so many connections, each asks again when it has its answer; once more beside a mesh
whose hops are AF_UNIX, which is as far as one could get. Fixed rate: so many requests a second, as
users send them, and with a hundred thousand iptables rules in the way.

The Envoys' connections are joined by the warm-up, and stay. Those of a closed loop's generator are
new in each run, and join within its first tenth of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from tests.bed import Bed, ends, envoy, h2load, mesh, pairs, wrk
from tests.bed.envoy import Sidecar, Tls
from tests.bed.pairs import Cost, Pair
from tests.bed.pingpong import SERVICE_IP
from tests.bed.wrk import Load
from tests.bench import fillers, openloop
from tests.bench.bench import Bench, Effort
from tests.bench.fillers import Place
from tests.bench.openloop import Rate

Protocol = Literal["http1", "mtls", "http2"]
SMALL = "/answer"
LARGE = "/body-65536"
FILES = {LARGE[1:]: b"x" * 65_536}
MESSAGE = b"m" * 100  # of a gRPC-like request
TOLD = ("p50_us", "p99_us", "cpu_us_per_request")


@dataclass(frozen=True)
class Plan:
    """How much to measure."""

    closed: Mapping[Protocol, tuple[int, ...]]  # connections
    seconds: float  # of a closed loop; wrk takes whole ones
    fixed: Mapping[Place, tuple[tuple[str, int], ...]]  # where rules are: paths, requests a second
    rules: int
    rate_ms: int
    pairs: int
    rate_pairs: int
    unix: tuple[int, ...]  # connections of a closed loop over AF_UNIX, too


SMOKE: Mapping[Place, tuple[tuple[str, int], ...]] = {
    "none": ((SMALL, 100),),
    "filter": ((SMALL, 100),),
}
PLANS: dict[Effort, Plan] = {
    "full": Plan(
        closed={"http1": (1, 8, 32), "mtls": (1, 8), "http2": (8,)},
        seconds=2,
        fixed={"none": ((SMALL, 200), (SMALL, 1_000), (LARGE, 200)), "filter": ((SMALL, 200),)},
        rules=100_000,
        rate_ms=2_500,  # a stall of 20 ms, as a shared machine has them, is then below 1 %
        pairs=5,
        rate_pairs=7,
        unix=(1, 8),
    ),
    "quick": Plan({"http1": (1, 8)}, 1, {"none": ((SMALL, 1_000),)}, 0, 800, 3, 3, (1,)),
    "smoke": Plan({"http2": (2,)}, 0.1, SMOKE, 100, 50, 1, 1, (2,)),
}


@dataclass(frozen=True)
class Way:
    """A mesh that is up; over: its first hop's socket, where that is one of AF_UNIX."""

    pair: Pair
    over: Path | None = None


def run(bench: Bench) -> None:
    """Measure everything that the plan says."""
    plan = PLANS[bench.effort]
    with bench.bed() as bed, pairs.pairs(bed) as both:
        for protocol in plan.closed:
            _closed(bench, plan, bed, both, protocol)
        with ExitStack() as stack:
            _start(stack, both, bench.cpu)
            over_unix = stack.enter_context(_over_unix(bed, bench.cpu))
            _beside_unix(bench, plan, [*map(Way, both), over_unix])
            _fixed(bench, plan, bed, both)
        bench.keep_counters(bed, both[1])


def _start(
    stack: ExitStack,
    both: tuple[Pair, Pair],
    cpu: str,
    *,
    protocol: Protocol = "http1",
    tls: Mapping[str, Tls] | None = None,
) -> None:
    """Both meshes up; the one that is not loaded waits and costs nothing."""
    sidecar = Sidecar(endpoint=None, protocol="http2" if protocol == "http2" else "http")
    for pair in both:
        stack.enter_context(
            mesh.running(pair.client, pair.server, FILES, sidecar=sidecar, tls=tls, cpus=cpu)
        )


@contextmanager
def _over_unix(bed: Bed, cpu: str) -> Iterator[Way]:
    """The limit: the same mesh with AF_UNIX in the place of each hop's TCP."""
    with pairs.pair(bed, "unix") as pair:
        folder = bed.folder / "unix"
        with mesh.running_over_unix(pair.client, pair.server, FILES, folder, cpus=cpu) as over:
            yield Way(pair, over)


def _closed(
    bench: Bench, plan: Plan, bed: Bed, both: tuple[Pair, Pair], protocol: Protocol
) -> None:
    names = [pod.name for pair in both for pod in (pair.client, pair.server)]
    tls = envoy.make_tls(bed.folder / "tls", names) if protocol == "mtls" else None
    generate = _grpc_like if protocol == "http2" else _http1
    with ExitStack() as stack:
        _start(stack, both, bench.cpu, protocol=protocol, tls=tls)
        for pair in both:
            generate(pair, 8, plan.seconds, bench.cpu)
        for connections in plan.closed[protocol]:
            case = f"closed/{protocol}/{connections}"
            for number, pair in pairs.alternated(both, plan.pairs):
                run_it = partial(generate, pair, connections, plan.seconds, bench.cpu)
                _keep(bench, case, pair, number, run_it)
            bench.tell(case, *TOLD, "requests_per_cpu_s")


def _keep(bench: Bench, case: str, pair: Pair, number: int, run_it: Callable[[], Load]) -> None:
    load, cost = pairs.measured(pair, bench.cpu, run_it)
    values = _values(load, load.requests, cost)
    values["requests_per_cpu_s"] = load.requests / cost.cpu_s
    bench.record(case, pair.kind, number, values, load.latencies)


def _beside_unix(bench: Bench, plan: Plan, ways: Sequence[Way]) -> None:
    """A closed loop again, with a load generator that knows AF_UNIX as well."""
    get = partial(h2load.get, url=mesh.SERVICE_URL + SMALL, seconds=plan.seconds, cpus=bench.cpu)
    for connections in plan.unix:
        case = f"unix/{connections}"
        for number, way in pairs.alternated(ways, plan.pairs):
            run_it = partial(get, way.pair.client, connections=connections, over=way.over)
            _keep(bench, case, way.pair, number, run_it)
        bench.tell(case, *TOLD, "requests_per_cpu_s")


def _http1(pair: Pair, connections: int, seconds: float, cpu: str) -> Load:
    url = mesh.SERVICE_URL + SMALL
    return wrk.run(pair.client, url, connections=connections, seconds=round(seconds), cpus=cpu)


def _grpc_like(pair: Pair, connections: int, seconds: float, cpu: str) -> Load:
    url = mesh.SERVICE_URL + SMALL
    return h2load.post(
        pair.client, url, MESSAGE, connections=connections, seconds=seconds, cpus=cpu
    )


def _fixed(bench: Bench, plan: Plan, bed: Bed, both: tuple[Pair, Pair]) -> None:
    program = ends.compiled(openloop.SOURCE, bed.folder)
    for place, asked in plan.fixed.items():
        with fillers.standing(bed.host, place, plan.rules):
            for path, per_second in asked:
                rate = Rate(path, per_second, plan.rate_ms)
                body = "small" if path == SMALL else "64KB"
                case = f"fixed/{place}/{body}/{per_second}"
                for number, pair in pairs.alternated(both, plan.rate_pairs):
                    values, latencies = _at_rate(pair, program, rate, bench.cpu)
                    bench.record(case, pair.kind, number, values, latencies)
                bench.tell(case, *TOLD)


def _at_rate(
    pair: Pair, program: Path, rate: Rate, cpu: str
) -> tuple[dict[str, float], dict[int, int]]:
    with openloop.warm(program, pair.client, SERVICE_IP, rate, cpu) as go:
        outcome, cost = pairs.measured(pair, cpu, go)
    values = _values(outcome.load, outcome.answered, cost)
    return {"unanswered": float(outcome.unanswered), **values}, outcome.load.latencies


def _values(load: Load, answered: int, cost: Cost) -> dict[str, float]:
    """Every CPU second of the pods counts, the load generator's too, as its sends do the work."""
    return {
        **{f"p{str(p).replace('.', '')}_us": load.latency_us(p) for p in (50, 90, 99, 99.9)},
        "requests_per_s": answered / load.duration_s,
        "cpu_us_per_request": cost.cpu_s / answered * 1e6,
        "busy_us_per_request": (cost.cpu_s + cost.foreign_s) / answered * 1e6,
    }
