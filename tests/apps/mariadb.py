# SPDX-License-Identifier: Apache-2.0
"""MariaDB: its own client for large values and many rows, sysbench for the load."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tests.apps import tools
from tests.apps.application import Application, Figures, LoadRun
from tests.apps.place import TWO_HOPS, Link, Place
from tests.apps.tools import PATIENCE_S

ROWS = 20_000
LARGE = 8_000_000
THREADS = 8
TABLE = ["--tables=1", "--table-size=2000"]
_COUNT = re.compile(r"^\s*([\d.]+) \|\**\s+(\d+)$", re.MULTILINE)  # of sysbench's histogram, ms


@cache
def _template() -> Path:
    """A data folder as the installer makes it, once per machine: it takes seconds."""
    made = tools.MADE / "mariadb"
    with tools.only_one(tools.MADE):
        if not (made / "mysql").exists():
            shutil.rmtree(made, ignore_errors=True)
            options = ["--no-defaults", "--user=root", "--skip-test-db", f"--datadir={made}"]
            done = subprocess.run(
                ["mariadb-install-db", *options], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(f"mariadb-install-db: {done.stdout}{done.stderr}")
    return made


@contextmanager
def serve(place: Place) -> Iterator[None]:
    """A server that lets everybody in, with sysbench's table."""
    link = place.front
    folder = link.server.folder("mariadb") / "data"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(_template(), folder)
    for path in (folder, *folder.rglob("*")):
        link.server.give(path)
    options = [
        "--no-defaults",
        "--skip-grant-tables",
        "--skip-name-resolve",
        f"--datadir={folder}",
        f"--socket={folder}/socket",
        f"--pid-file={folder}/pid",
        f"--port={link.listen_port}",
        "--bind-address=0.0.0.0",
        "--max-allowed-packet=64M",
        "--innodb-flush-log-at-trx-commit=0",
        "--innodb-buffer-pool-size=64M",
    ]
    with link.serving(["mariadbd", *options]):
        _sql(link, "create database test", database="")
        _sysbench(link, "prepare", "oltp_read_write")
        yield


def _sql(link: Link, statements: str, *, database: str = "test") -> str:
    """What the client prints of statements that it reads from a file."""
    path = link.client.folder("mariadb-client") / "statements"
    path.write_text(statements)
    path.chmod(0o644)
    where = f"-h {link.destination} -P {link.port} -u app --skip-ssl"
    options = "--no-defaults --protocol=tcp --max-allowed-packet=64M -N -B --raw"
    command = f"mariadb {options} {where} {database} < {path}"
    return link.client.run(["sh", "-c", command], timeout_s=PATIENCE_S).rstrip("\n")


def check(place: Place) -> None:
    """Rows in and out again, one large value each way, a mixed load of sysbench's."""
    link = place.front
    rows = [f"{number}\t{'%032x' % (number * 7919)}" for number in range(1, ROWS + 1)]
    values = ",".join("({},'{}')".format(*row.split("\t")) for row in rows)
    _sql(link, f"create or replace table r(i int primary key, t text);insert into r values{values}")
    assert _sql(link, "select i, t from r order by i").splitlines() == rows
    assert _sql(link, f"select repeat('0123456789abcdef', {LARGE // 16})") == (
        "0123456789abcdef" * (LARGE // 16)
    )
    value = "fedcba9876543210" * (LARGE // 16)
    told = _sql(link, f"select '{value}' = repeat('fedcba9876543210', {LARGE // 16})")
    assert told == "1", told
    assert sysbench(link, "oltp_read_write", ["--events=200", "--time=0"]).requests == 200


def _sysbench(link: Link, command: str, test: str, amount: tuple[str, ...] | list[str] = ()) -> str:
    where = [f"--mysql-host={link.destination}", f"--mysql-port={link.port}", "--mysql-user=app"]
    options = ["--db-driver=mysql", "--mysql-db=test", "--mysql-ssl=off", *TABLE, *amount]
    return link.client.run(["sysbench", test, *where, *options, command], timeout_s=PATIENCE_S)


def sysbench(link: Link, test: str, amount: list[str]) -> Figures:
    """A run of one of sysbench's tests."""
    amount = [*amount, f"--threads={THREADS}", "--histogram=on"]
    out = _sysbench(link, "run", test, amount)
    counts = {float(ms) * 1e3: int(count) for ms, count in _COUNT.findall(out)}
    seconds = re.search(r"total time:\s+([\d.]+)s", out)
    failed = re.search(r"ignored errors:\s+(\d+)", out)
    assert counts, out
    assert seconds is not None, out
    assert failed is None or test == "oltp_read_write" or failed[1] == "0", out
    total = sum(counts.values())
    latencies = [us for us, count in sorted(counts.items()) for _ in range(count)]
    p50, p99 = latencies[total // 2], latencies[total * 99 // 100]
    return Figures(total, float(seconds[1]), p50, p99)


def load(test: str) -> LoadRun:
    """One of sysbench's tests for some seconds."""
    return lambda place, seconds: sysbench(place.front, test, [f"--time={max(1, round(seconds))}"])


APPLICATIONS = (
    Application(
        "mariadb",
        "MariaDB, sysbench",
        reader="blocking",
        protocol="server-first",
        serve=serve,
        check=check,
        loads={"point select": load("oltp_point_select"), "read only": load("oltp_read_only")},
        advice="its threads block in recv: stays on TCP",
        hops=TWO_HOPS,
    ),
)
