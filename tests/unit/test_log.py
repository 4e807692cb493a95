# SPDX-License-Identifier: Apache-2.0
"""The lines on stderr: with any text in a value, a line is one event and can be read back."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from install.program import log
from tests.unit.test_attachment import BLANK


@pytest.fixture(autouse=True)
def _plain_again() -> Iterator[None]:
    yield
    log.setup("plain")


def said(capfd: pytest.CaptureFixture[str]) -> str:
    """What was written since the last time; exactly one line."""
    text = capfd.readouterr().err
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text[:-1]


def test_plain_is_a_sentence_that_names_the_pod(capfd: pytest.CaptureFixture[str]) -> None:
    log.info("started", "watching /etc/cni/net.d", path="/etc/cni/net.d")
    assert said(capfd) == "watching /etc/cni/net.d"
    log.info("repaired", "accelerated a pod", pod="shop/cart")
    assert said(capfd) == "accelerated a pod (shop/cart)"
    log.info("repaired", "accelerated shop/cart", pod="shop/cart")
    assert said(capfd) == "accelerated shop/cart"
    log.warning("busy", "two\nlines")
    assert said(capfd) == "warning: two lines"
    log.error("lost", "gone")
    assert said(capfd) == "error: gone"


def test_logfmt(capfd: pytest.CaptureFixture[str]) -> None:
    log.setup("logfmt")
    log.warning("pod_kept", "it stays", pod="shop/cart-7d9", container=None, count=3, forced=True)
    line = said(capfd)
    assert re.match(r"ts=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=warning ", line)
    assert line.endswith(' event=pod_kept msg="it stays" pod=shop/cart-7d9 count=3 forced=true')


def test_json_keeps_types(capfd: pytest.CaptureFixture[str]) -> None:
    log.setup("json")
    log.info("counted", "so many", count=3, path=os.fspath, empty=None, ready=False)
    found = json.loads(said(capfd))
    assert list(found) == ["ts", "level", "event", "msg", "count", "path", "ready"]
    assert (found["count"], found["ready"]) == (3, False)
    assert isinstance(found["path"], str)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text())
def test_no_value_breaks_a_line(capfd: pytest.CaptureFixture[str], value: str) -> None:
    log.setup("json")
    log.info("e", value, pod=value)
    found = json.loads(said(capfd))
    assert (found["msg"], found["pod"]) == (value, value)
    log.setup("logfmt")
    log.info("e", "m", pod=value)
    line = said(capfd)
    assert line.isascii()
    assert line.isprintable()
    quoted = line.partition(" pod=")[2]
    assert (json.loads(quoted) if quoted.startswith('"') else quoted) == value
    log.setup("plain")
    log.info("e", value or "-")
    said(capfd)


def test_a_line_of_logfmt_splits_into_its_fields(capfd: pytest.CaptureFixture[str]) -> None:
    """shlex reads quotes and backslashes the way every logfmt reader does."""
    log.setup("logfmt")
    log.error("forged", 'x" level=info event=fine', path="/a=b c", empty="")
    fields = dict(part.split("=", 1) for part in shlex.split(said(capfd)))
    assert (fields["level"], fields["event"]) == ("error", "forged")
    assert fields["msg"] == 'x" level=info event=fine'
    assert (fields["path"], fields["empty"]) == ("/a=b c", "")


def test_which_pod(capfd: pytest.CaptureFixture[str]) -> None:
    log.setup("logfmt")
    log.info("e", "m", **log.of(BLANK._replace(pod_namespace="shop", pod_name="cart")))
    assert said(capfd).endswith(" pod=shop/cart container=c")
    assert log.of(None) == {}


def test_a_closed_stderr_stops_no_program() -> None:
    kept = os.dup(2)
    os.close(2)
    try:
        log.error("unheard", "no reader")
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_lines_below_the_level_are_not_written(capfd: pytest.CaptureFixture[str]) -> None:
    log.setup("plain", "warning")
    log.info("started", "not said")
    log.warning("busy", "said")
    assert said(capfd) == "warning: said"
    log.setup("plain", "error")
    log.warning("busy", "not said")
    log.error("lost", "said")
    assert said(capfd) == "error: said"
