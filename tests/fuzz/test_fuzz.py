# SPDX-License-Identifier: Apache-2.0
"""A short run of the stream fuzzer over loopback and over the three hops between two pods."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from tests.fuzz import engine, settings
from tests.fuzz.engine import Options, Report
from tests.fuzz.settings import Setting

SEED = 20240229
MOST_RUNS = 6


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)  # the pods' users run the program from there
    return settings.compiled(folder)


def assert_flawless(report: Report) -> None:
    """Nothing lost, swapped, doubled, stalled, with all that disturbs."""
    assert report.bad == [], report.as_json()
    assert report.connections > 100
    assert report.aborted > 0
    assert report.killed > 0
    assert report.pauses > 0


def has_tried(report: Report) -> bool:
    """Whether it was the bypass that was tried, and TCP; since the setting was made."""
    counters = report.counters
    messages = (counters.bypassed_messages, sum(counters.tcp_messages.values()))
    return counters.joined > 50 and min(messages) > 1000


def run_until(
    is_enough: Callable[[Report], bool], program: Path, place: Setting, options: Options
) -> Report:
    """A busy machine has few passes, so the traffic runs again until it is enough; the last run."""
    for seed in range(options.seed, options.seed + MOST_RUNS):
        report = engine.run(program, place, replace(options, seed=seed))
        assert_flawless(report)
        if is_enough(report):
            break
    return report


def test_loopback(program: Path) -> None:
    for seed in range(SEED, SEED + MOST_RUNS):
        with settings.loopback() as place:
            options = Options(seed, seconds=12, kills=100, reload_every_s=3, leave_flips=True)
            report = engine.run(program, place, options)
        assert_flawless(report)
        # About half of the ends, where passes go on all the time.
        if report.counters.joined > report.connections // 4:
            break
    assert report.counters.joined > report.connections // 4, report.as_json()
    assert has_tried(report), report.as_json()
    assert report.reloads > 0
    assert report.counters.left > 0


def test_three_hops(program: Path) -> None:
    options = Options(SEED, seconds=10, at_once=16, kills=100, leave_flips=True)
    with settings.pods(settings.HOPS) as place:
        report = run_until(has_tried, program, place, options)
    assert has_tried(report), report.as_json()


def test_families_and_paths(program: Path) -> None:
    """Some of all that `--hops` knows; every one of them bypasses, but for those that opted out."""
    wanted = {"outbound6", "sidecars-mapped", "inbound6", "tproxy", "direct6", "service", "local"}
    wanted.add("excluded")
    with settings.pods([*sorted(wanted), "opted-out"]) as place:

        def bypassed() -> set[str]:
            return {name for name in place.routes if place.bypassed(name)}

        options = Options(SEED, seconds=8, at_once=6, kills=100)
        report = run_until(
            lambda report: bypassed() >= wanted and has_tried(report), program, place, options
        )
        assert bypassed() == wanted
    assert has_tried(report), report.as_json()


def test_traffic_finds_what_is_wrong_with_a_stream(program: Path) -> None:
    """The fuzzer's own eyes: two ends that do not agree on the seed must report every stream."""
    with settings.loopback() as place:
        route = place.routes[settings.LOOPBACK]
        argv = [str(program), "serve", "1", "0", route.listen, *map(str, route.listen_ports)]
        with engine.ending(place.spawn("", argv, serves=True)) as server:
            assert server.stdout
            server.stdout.readline()
            drive = ["drive", "2", "0", route.source, route.target, *map(str, route.ports)]
            argv = [str(program), *drive, "0", "6", "10", "3"]
            with engine.ending(place.spawn("", argv, serves=False)) as client:
                assert client.stdout
                assert '"event":"mismatch"' in told_by([client.stdout, server.stdout])


def told_by(outputs: list[IO[str]]) -> str:
    """What processes write until one of them tells of a mismatch, or both are silent."""
    told = ""
    while '"event":"mismatch"' not in told:
        ready = select.select(outputs, [], [], 60)[0]
        part = b"".join(os.read(output.fileno(), 65_536) for output in ready)
        if not part:
            break
        told += part.decode()
    return told
