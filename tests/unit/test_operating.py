# SPDX-License-Identifier: Apache-2.0
"""docs/operating.md names every metric, reason, outcome and event that there is, and no other."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from bpf import abi
from install.program import switch
from install.program.agent.agent import Agent, Settings
from install.program.agent.http import Health
from install.program.agent.metrics import REPAIRS, Metrics
from install.program.check import finding
from install.program.conflist import Entry
from install.program.host import OWN_PROC
from install.program.installer import Places
from install.program.node import Node
from tests.unit.cases import ROOT

TEXT = (ROOT / "docs" / "operating.md").read_text()
LOG_CALLS = {"info", "warning", "error"}


def section(heading: str) -> str:
    """A section's text, up to the next one."""
    return TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def named_in(table: str) -> set[str]:
    """What stands in backquotes in the first column."""
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split(" | ")[0])}


def test_metrics_reasons_and_outcomes() -> None:
    rendered = Metrics(Node(Path("/no/bpffs"), Path("/no/state"))).render().decode()
    exported = set(re.findall(r"^(tcpip_bypass_\w+)", rendered, re.MULTILINE))
    exported |= {"tcpip_bypass_sockets", "tcpip_bypass_sockets_limit"}  # where programs are loaded
    assert named_in(section("Metrics")) == exported | set(abi.REASONS[1:]) | set(abi.OUTCOMES[1:])
    for name in (*REPAIRS, *abi.HOPS):
        assert f"`{name}`" in TEXT


def test_alerts_use_metrics_that_exist() -> None:
    known = named_in(section("Metrics"))
    used = set(re.findall(r"tcpip_bypass_\w+", section("Alerts")))
    assert used
    assert used <= known


def events() -> Iterator[str]:
    """The first argument of each call of log, as a pattern; each {...} in it may be any text."""
    for path in sorted((ROOT / "install").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and is_log(node.func):
                yield pattern(node.args[0])


def is_log(function: ast.expr) -> bool:
    return (
        isinstance(function, ast.Attribute)
        and function.attr in LOG_CALLS
        and isinstance(function.value, ast.Name)
        and function.value.id == "log"
    )


def pattern(event: ast.expr) -> str:
    if isinstance(event, ast.JoinedStr):
        return "".join(map(pattern, event.values))
    if isinstance(event, ast.FormattedValue):
        return ".+"
    assert isinstance(event, ast.Constant), ast.dump(event)
    return re.escape(str(event.value))


def test_events() -> None:
    said, named = set(events()), named_in(section("Log"))
    assert len(said) > 20
    unnamed = {each for each in said if not any(re.fullmatch(each, name) for name in named)}
    assert unnamed == set()
    gone = {name for name in named if not any(re.fullmatch(each, name) for each in said)}
    assert gone == set()


def test_events_of_tasks(tmp_path: Path) -> None:
    """Each task may fail, and recover. A task waits only if its work raises Waiting."""
    node = Node(tmp_path / "bpffs", tmp_path / "state")
    places = Places(tmp_path, tmp_path, tmp_path, OWN_PROC)
    settings = Settings(places, Entry(None, {}), [], [], [], (), None, None, once=True)
    tasks = Agent(node, settings, Metrics(node), Health())._tasks
    said = {f"{task.name}_{how}" for task in tasks for how in ("failed", "recovered")}
    waiting = [task for task in tasks if "Waiting(" in inspect.getsource(task.work)]
    said |= {f"{task.name}_waiting" for task in waiting}
    any_task = "|".join(task.name for task in tasks)
    event = re.compile(rf"({any_task})_(failed|recovered|waiting)")
    assert {each for each in named_in(section("Log")) if event.fullmatch(each)} == said


def test_what_to_do_about_a_mismatch() -> None:
    """Of its causes, the two that an operator can do something about."""
    (row,) = [line for line in TEXT.splitlines() if line.startswith("| `mismatch` |")]
    assert "PassthroughCluster" in row
    assert "restart the server" in row


def test_the_way_to_turn_it_off_everywhere() -> None:
    text = (ROOT / "SECURITY.md").read_text().partition("everywhere")[2]
    link = "docs/deploy.md#turn-it-off-everywhere"
    assert link == finding.SWITCH
    assert f"`{switch.CONFIGMAP}` ([docs/deploy.md]({link}))" in " ".join(text.split())
    assert "`paused`" in text
