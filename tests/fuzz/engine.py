# SPDX-License-Identifier: Apache-2.0
"""Runs traffic over a setting, disturbs it, and judges what its two ends tell."""

from __future__ import annotations

import json
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bpf.loader import LoadError
from bpf.stats import HopCounters
from tests.fuzz.settings import Route, Setting

KINDS = ("ping_pong", "duplex", "one_way", "events", "frames")
GRACE_S = 90  # for the last connections to end, stalled ones included


@dataclass(frozen=True)
class Options:
    """What to run. Replayed by the same seed and numbers; only the timing is another."""

    seed: int
    seconds: int
    at_once: int = 48  # connections, on each route
    kills: int = 40  # of a process at either end, per 100 s
    pause_flips: bool = True
    leave_flips: bool = False  # all sockets are to leave, and may join again
    reload_every_s: float = 0  # 0: never
    first: int = 0
    count: int = 0  # 0: as many as there is time for


@dataclass
class Report:
    """What came of it. Anything in `mismatches`, `lost`, `woken`, `hangs` or `crashes` is a bug."""

    options: Options
    routes: list[str]
    connections: int = 0
    aborted: int = 0
    killed: int = 0
    bytes: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    mismatches: list[dict[str, Any]] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)  # streams that ended early
    hangs: list[dict[str, Any]] = field(default_factory=list)
    crashes: list[dict[str, Any]] = field(default_factory=list)
    refused: int = 0
    woken: list[dict[str, Any]] = field(default_factory=list)  # a blocking recv returned EAGAIN
    pauses: int = 0
    leaves: int = 0
    reloads: int = 0
    counters: HopCounters = field(default_factory=HopCounters)

    @property
    def bad(self) -> list[dict[str, Any]]:
        return [*self.mismatches, *self.lost, *self.woken, *self.hangs, *self.crashes]

    @property
    def bypassed_share(self) -> float:
        """Of all bytes that the programs have counted."""
        total = self.counters.bypassed_bytes + self.counters.tcp_bytes
        return self.counters.bypassed_bytes / total if total else 0.0

    def as_json(self) -> str:
        content = asdict(self)
        content["bypassed_share"] = round(self.bypassed_share, 3)
        return json.dumps(content, indent=1)


@dataclass
class Traffic:
    """Both ends of one route, and the lines they have written."""

    name: str
    server: subprocess.Popen[str]
    client: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    readers: list[threading.Thread] = field(default_factory=list)


def run(program: Path, setting: Setting, options: Options) -> Report:
    """Traffic on every route of the setting until time is up, disturbed all the while."""
    report = Report(options, list(setting.routes))
    with ExitStack() as stack:
        traffic = [
            stack.enter_context(running(program, setting, name, route, options))
            for name, route in setting.routes.items()
        ]
        with disturbed(setting, options, report):
            for one in traffic:
                wait_until_done(one, options, report)
    report.counters = setting.counters()
    for one in traffic:
        judge(one, report)
    return report


@contextmanager
def running(
    program: Path, setting: Setting, name: str, route: Route, options: Options
) -> Iterator[Traffic]:
    """The server and the client of one route; on leaving both have ended."""
    common = [str(options.seed), str(options.kills)]
    serve = [str(program), "serve", *common, route.listen, *map(str, route.listen_ports)]
    drive = [str(program), "drive", *common, route.source, route.target, *map(str, route.ports)]
    limits = (options.first, options.count, options.seconds, options.at_once)
    with ExitStack() as stack:
        server = stack.enter_context(ending(setting.spawn(name, serve, serves=True)))
        assert server.stdout
        if '"ready"' not in server.stdout.readline():
            raise RuntimeError(f"stream serve does not listen on route {name}")
        argv = [*drive, *map(str, limits)]
        client = stack.enter_context(ending(setting.spawn(name, argv, serves=False)))
        traffic = Traffic(name, server, client)
        for process in (server, client):
            reader = threading.Thread(target=read_lines, args=(process, traffic, setting))
            reader.start()
            traffic.readers.append(reader)
        yield traffic


@contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, ended on leaving; its workers end with it."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def read_lines(process: subprocess.Popen[str], traffic: Traffic, setting: Setting) -> None:
    """Collects what an end tells; looks at the sockets of a stalled connection at once."""
    assert process.stdout
    for line in process.stdout:
        told = json.loads(line)
        if told["event"] == "stalled":
            told["sockets"] = setting.sockets(traffic.name, told["port"])
        traffic.lines.append({"route": traffic.name, **told})


def wait_until_done(traffic: Traffic, options: Options, report: Report) -> None:
    """Until the client has ended by itself, then the server; both have told everything."""
    try:
        traffic.client.wait((options.seconds or 3600) + GRACE_S)
    except subprocess.TimeoutExpired:
        report.hangs.append({"route": traffic.name, "event": "the client did not end"})
        traffic.client.kill()
    traffic.server.terminate()
    for reader in traffic.readers:
        reader.join(GRACE_S)


@contextmanager
def disturbed(setting: Setting, options: Options, report: Report) -> Iterator[None]:
    """Pauses, takes out, loads anew, all of it again and again, while the context lasts."""
    over = threading.Event()
    dice = random.Random(options.seed)
    threads = []
    if options.pause_flips:
        threads.append(threading.Thread(target=flip, args=(setting, dice, over, report)))
    if options.leave_flips:
        threads.append(threading.Thread(target=take_out, args=(setting, dice, over, report)))
    if options.reload_every_s:
        arguments = (setting, options.reload_every_s, over, report)
        threads.append(threading.Thread(target=load_anew, args=arguments))
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def flip(setting: Setting, dice: random.Random, over: threading.Event, report: Report) -> None:
    while not over.wait(dice.uniform(0.05, 0.6)):
        pod = dice.choice(setting.pods) if setting.pods and dice.random() < 0.5 else None
        setting.pause(True, pod)
        report.pauses += 1
        time.sleep(dice.uniform(0.005, 0.15))
        setting.pause(False, pod)


def take_out(setting: Setting, dice: random.Random, over: threading.Event, report: Report) -> None:
    while not over.wait(dice.uniform(0.1, 1)):
        setting.leave(True)
        report.leaves += 1
        time.sleep(dice.uniform(0.005, 0.2))
        setting.leave(False)


def load_anew(setting: Setting, every_s: float, over: threading.Event, report: Report) -> None:
    while not over.wait(every_s):
        try:
            setting.reload()
        except (LoadError, RuntimeError) as error:
            report.crashes.append({"event": f"the programs did not load anew: {error}"})
        report.reloads += 1


def judge(traffic: Traffic, report: Report) -> None:
    """Adds one route's lines to the report."""
    by_event: dict[str, list[dict[str, Any]]] = {}
    for line in traffic.lines:
        by_event.setdefault(line["event"], []).append(line)
    killed = by_event.get("killed", [])
    report.killed += sum(line["connection"] != -1 for line in killed)
    report.mismatches += by_event.get("mismatch", [])
    report.hangs += by_event.get("stalled", [])
    report.crashes += by_event.get("crashed", [])
    report.woken += by_event.get("woken", [])
    report.refused += len(by_event.get("refused", []))
    report.lost += [line for line in by_event.get("short", []) if not explained(line, killed)]
    totals = by_event.get("done", [])
    if len(totals) != 2:
        report.crashes.append({"route": traffic.name, "event": "an end did not report its totals"})
    for line in totals:
        report.bytes += line["heard"]
        if line["side"] == 0:
            report.connections += line["connections"]
            report.aborted += line["aborted"]
            for kind in KINDS:
                report.by_kind[kind] = report.by_kind.get(kind, 0) + line[kind]


def explained(short: dict[str, Any], killed: list[dict[str, Any]]) -> bool:
    """Whether a process that had the connection was killed.

    Before the server has read the connection's number it knows only the client's port.
    """
    number, port = short["connection"], short["port"]
    return any(one["connection"] in {number, -1} and one["port"] == port for one in killed)
