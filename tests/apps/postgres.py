# SPDX-License-Identifier: Apache-2.0
"""PostgreSQL: psql for large values and COPY both ways, pgbench for the load."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.apps import application, tools
from tests.apps.application import Application, Figures, LoadRun
from tests.apps.place import End, Link, Place
from tests.apps.tools import PATIENCE_S

ROWS = 40_000
LARGE = 8_000_000
CLIENTS = 8
SCALE = 1
SETTINGS = {
    "fsync": "off",
    "shared_buffers": "32MB",
    "max_connections": "50",
    "unix_socket_directories": "''",
    "listen_addresses": "'*'",
    "logging_collector": "off",
    "autovacuum": "off",
}


@cache
def _program(name: str) -> str:
    """A program of the newest PostgreSQL of the distribution, whose servers are not on PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    if not found:
        raise FileNotFoundError(f"no {name} in /usr/lib/postgresql/*/bin; run `make setup`")
    return str(found[-1])


@cache
def _template() -> Path:
    """A cluster as initdb makes it, once per machine: it takes seconds."""
    made = tools.MADE / f"postgres-{_program('initdb').split('/')[-3]}"
    with tools.only_one(tools.MADE):
        if not (made / "PG_VERSION").exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(mode=0o700)
            user = pwd.getpwnam("postgres")  # initdb wants a user with a name, and not root
            os.chown(made, user.pw_uid, user.pw_gid)
            argv = [_program("initdb"), "-D", "/proc/self/cwd", "-U", "app", "-A", "trust"]
            subprocess.run(
                [*argv, "--no-sync", "-E", "UTF8", "--locale", "C"],
                cwd=made,
                user=user.pw_uid,
                group=user.pw_gid,
                extra_groups=[],
                stdout=subprocess.DEVNULL,
                check=True,
            )
    return made


def _cluster(end: End) -> Path:
    """A new cluster of the container's user."""
    folder = end.folder("postgres") / "data"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_template(), folder)
    for path in (folder, *folder.rglob("*")):
        end.give(path)
    with (folder / "postgresql.conf").open("a") as conf:
        conf.writelines(f"{key} = {value}\n" for key, value in SETTINGS.items())
    with (folder / "pg_hba.conf").open("a") as hba:
        hba.write("host all all 0.0.0.0/0 trust\n")
    return folder


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """A cluster of its own, with pgbench's tables."""
    link = place.front
    folder = _cluster(link.server)
    argv = [_program("postgres"), "-D", str(folder), "-p", str(link.listen_port)]
    with link.serving(argv) as server:
        try:
            fill = ["pgbench", "-i", "-I", "dtgvp", "-s", str(SCALE), "-q", *_where(link)]
            link.client.run(fill, timeout_s=PATIENCE_S)
            yield
        finally:
            server.send_signal(signal.SIGINT)  # its children have sessions of their own
            server.wait()


def _where(link: Link) -> list[str]:
    return ["-h", link.destination, "-p", str(link.port), "-U", "app", "postgres"]


def _psql(link: Link, *arguments: str) -> str:
    argv = ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", *arguments]
    return link.client.run([*argv, *_where(link)], timeout_s=PATIENCE_S).strip()


def check(place: Place) -> None:
    """Rows by COPY out and in again, one large value each way, a benchmark's sum."""
    link = place.front
    folder = link.client.folder("psql")
    out, large = folder / "rows", folder / "large"
    rows = f"select i, md5(i::text) from generate_series(1, {ROWS}) i order by i"
    told = _psql(link, "-c", f"select md5(string_agg(i || ' ' || md5, ',')) from ({rows}) r")
    _psql(link, "-c", f"\\copy ({rows}) to {out}")
    assert len(out.read_text().splitlines()) == ROWS
    table = "create temp table r(i int, md5 text)"
    back = "select md5(string_agg(i || ' ' || md5, ',' order by i)) from r"
    assert _psql(link, "-c", table, "-c", f"\\copy r from {out}", "-c", back) == told
    value = f"repeat(md5('a'), {LARGE // 32})"
    got = _psql(link, "-c", f"select {value}")
    assert len(got) == LARGE
    large.write_text(f"select md5('{got}') = md5({value});\n")
    large.chmod(0o644)
    assert _psql(link, "-f", str(large)) == "t"
    pgbench(place, ["-T", "1"])
    sums = "select sum(delta) from pgbench_history", "select sum(bbalance) from pgbench_branches"
    assert len({_psql(link, "-c", each) for each in sums}) == 1


def pgbench(place: Place, amount: list[str]) -> Figures:
    """A run of pgbench, with a latency of each transaction."""
    link = place.front
    folder = link.client.folder("pgbench")
    for old in folder.iterdir():
        old.unlink()
    log = ["-l", f"--log-prefix={folder}/log"]
    out = link.client.run(["pgbench", "-n", "-c", str(CLIENTS), *amount, *log, *_where(link)])
    per_second = re.search(r"tps = ([\d.]+)", out)
    assert per_second is not None, out
    lines = [line for path in folder.iterdir() for line in path.read_text().splitlines()]
    taken = [float(line.split()[2]) for line in lines]
    return application.figures(taken, len(taken) / float(per_second[1]))


def load(*options: str) -> LoadRun:
    """pgbench for some seconds."""
    return lambda place, seconds: pgbench(place, ["-T", str(max(1, round(seconds))), *options])


APPLICATIONS = (
    Application(
        "postgres",
        "PostgreSQL, pgbench",
        reader="event loop",
        protocol="tcp",
        serve=serve,
        check=check,
        loads={"TPC-B": load(), "SELECT": load("-S"), "SELECT, prepared": load("-S", "-Mprepared")},
    ),
)
