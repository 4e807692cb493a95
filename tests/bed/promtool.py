# SPDX-License-Identifier: Apache-2.0
"""Prometheus' own judgement, by promtool: are these rules valid, and which alerts do they fire?"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

# What Prometheus and the operator add to each series of one agent.
TARGET = {"job": "kube-system/tcpip-bypass-node", "instance": "10.0.0.1:15099"}
POD = "tcpip-bypass-node-x7k2p"
_FIRING = 'group by (alertname) (ALERTS{alertstate="firing"})'


@dataclass(frozen=True)
class Scrapes:
    """What one agent answers for some minutes; None: it does not, or there is none."""

    minutes: int
    text: str | None
    is_there: bool = True


def check(rules: Path) -> None:
    """Raises AssertionError with what promtool says against the rules."""
    _promtool("check", "rules", rules)


def check_expressions(expressions: Sequence[str]) -> None:
    """Raises AssertionError with what promtool says against them."""
    rules = [{"record": f"n{i}", "expr": each} for i, each in enumerate(expressions)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.yaml"
        path.write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}))
        check(path)


def firing(rules: Path, history: Sequence[Scrapes]) -> set[str]:
    """The alerts that fire at its end, one scrape and one evaluation a minute."""
    test = {
        "interval": "1m",
        "input_series": [{"series": k, "values": v} for k, v in _series(history).items()],
        # Of a test that fails promtool says what there was; it has no command that just says it.
        "promql_expr_test": [
            {"expr": _FIRING, "eval_time": f"{sum(each.minutes for each in history) - 1}m"}
        ],
    }
    document = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [test]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.yaml"
        path.write_text(json.dumps(document))
        done = subprocess.run(
            ["promtool", "test", "rules", path], capture_output=True, text=True, check=False
        )
    if done.returncode == 0:
        return set()
    said = done.stdout + done.stderr
    assert "got:" in said, said
    return set(re.findall(r'alertname="(\w+)"', said.partition("got:")[2]))


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """By name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _series(history: Sequence[Scrapes]) -> dict[str, str]:
    """promtool's notation: `5+0x9` is ten times 5, `_x10` is ten times nothing."""
    found = [samples(each.text) if each.text is not None else {} for each in history]
    keys = {key for each in found for key in each}
    rows = {
        _name(name, labels): " ".join(
            f"{values[name, labels]}+0x{each.minutes - 1}"
            if (name, labels) in values
            else f"_x{each.minutes}"
            for each, values in zip(history, found)
        )
        for name, labels in sorted(keys)
    }
    return {**rows, _name("up", (("pod", POD),)): " ".join(map(_up, history))}


def _up(each: Scrapes) -> str:
    answers = int(each.text is not None)
    return f"{answers}+0x{each.minutes - 1}" if each.is_there else f"_x{each.minutes}"


def _name(name: str, labels: Sequence[tuple[str, str]]) -> str:
    every = {**TARGET, **dict(labels)}
    return f"{name}{{{','.join(f'{key}={json.dumps(value)}' for key, value in every.items())}}}"


def _promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def selectors(expression: str) -> list[tuple[str, dict[str, Any]]]:
    """The metrics in an expression of PromQL, with the label matchers after each."""
    found = []
    for name, matchers in re.findall(r"\b([a-z_]+_[a-z_]+)\b(\{[^}]*\})?", expression):
        pairs = re.findall(r'(\w+)(=~|!~|!=|=)("[^"]*")', matchers)
        found.append((name, {key: (how, ast.literal_eval(value)) for key, how, value in pairs}))
    return found
