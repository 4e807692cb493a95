# SPDX-License-Identifier: Apache-2.0
"""When the agent takes its SIGTERM for the end of the DaemonSet, and when not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from install.program import commands, installer
from install.program.agent import kubernetes
from install.program.agent.agent import Agent, Settings
from install.program.agent.http import Health
from install.program.agent.kubernetes import DaemonSet, Question
from install.program.agent.metrics import Metrics
from install.program.agent.schedule import NotDone, Waiting
from install.program.lock import FolderLock
from install.program.node import Node
from tests.bed import apiserver
from tests.bed.apiserver import (
    BEING_DELETED,
    FORBIDDEN,
    GONE,
    UNAUTHORIZED,
    WANTED,
    Answer,
    ApiServer,
)

OURS = DaemonSet(apiserver.NAMESPACE, apiserver.NAME)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    monkeypatch.setattr(kubernetes, "SERVICE_ACCOUNT", tmp_path / "account")
    monkeypatch.setattr(kubernetes, "REFUSED_S", 3)
    monkeypatch.setattr(kubernetes, "TIMEOUT_S", 2)
    with apiserver.running(tmp_path) as running:
        running.write_service_account(tmp_path / "account")
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.mark.parametrize("answer", [GONE, BEING_DELETED])
def test_it_is_deleted(server: ApiServer, answer: Answer) -> None:
    server.answer = answer
    assert Question(OURS).ask().deleted
    assert server.asked == [(apiserver.PATH, f"Bearer {apiserver.TOKEN}")]


@pytest.mark.parametrize(
    "answer",
    [
        WANTED,
        FORBIDDEN,
        UNAUTHORIZED,
        (404, {"kind": "Status", "details": {}, "message": "no such resource"}),
        (404, {"details": {"kind": "namespaces", "name": apiserver.NAMESPACE}}),
        (404, "a proxy's page"),
        (200, {"kind": "Table"}),
        (200, []),
        (500, {"kind": "Status", "message": "etcd is not there"}),
        (503, {}),
    ],
)
def test_it_is_not_known_to_be_deleted(server: ApiServer, answer: Answer) -> None:
    server.answer = answer
    found = Question(OURS).ask()
    assert not found.deleted
    assert found.why
    assert len(server.asked) == 1


def test_it_is_deleted_when_the_right_to_ask_was_taken_away(server: ApiServer) -> None:
    question = Question(OURS)
    assert question.ask_while_well().status == 200
    server.answer = FORBIDDEN
    assert question.ask().deleted
    assert len(server.asked) > 2  # it was no passing mood


def test_no_answer_takes_no_right_away(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question(OURS)
    assert question.ask_while_well().status == 200
    with monkeypatch.context() as patched:
        patched.setenv("KUBERNETES_SERVICE_PORT", "1")
        assert question.ask_while_well().status == 0
    server.answer = FORBIDDEN
    assert question.ask().deleted


def test_a_refused_token_is_no_removal(server: ApiServer) -> None:
    """It ends with its pod: one that was deleted by force, or while kubelet was down."""
    question = Question(OURS)
    assert question.ask_while_well().status == 200
    server.answer = UNAUTHORIZED
    found = question.ask()
    assert (found.status, found.deleted) == (401, False)
    assert "Unauthorized" in found.why


def test_a_refusal_that_passes_is_none(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question(OURS)
    assert question.ask_while_well().status == 200
    server.answer = FORBIDDEN

    def recover(_seconds: float) -> None:
        server.answer = WANTED

    monkeypatch.setattr("install.program.agent.kubernetes.time.sleep", recover)
    assert not question.ask().deleted


def test_no_answer_in_time(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    assert "refused" in Question(OURS).ask().why
    assert server.asked == []


def test_a_stranger_answers(server: ApiServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with apiserver.running(tmp_path / "other") as other:
        other.write_service_account(tmp_path / "account")  # its certificate, not the server's
    server.answer = GONE
    found = Question(OURS).ask()
    assert not found.deleted
    assert "CERTIFICATE_VERIFY_FAILED" in found.why


def test_outside_a_pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kubernetes, "SERVICE_ACCOUNT", tmp_path)
    assert not Question(OURS).ask().deleted
    (tmp_path / "token").write_text("t")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert not Question(OURS).ask().deleted


@pytest.mark.parametrize("text", ["", "name", "/name", "namespace/", "a/b\n"])
def test_a_daemonset_is_named_in_full(text: str) -> None:
    with pytest.raises(ValueError, match="NAMESPACE/NAME"):
        DaemonSet.parse(text)


def agent_of(node: Node) -> Agent:
    folder = node.state_dir.parent
    places = installer.Places(*(folder / name for name in ("conf", "bin", "plugin", "proc")))
    entry = installer.entry(node.bpffs, node.state_dir, None)
    settings = Settings(places, entry, [], [], [], (), Question(OURS), None, once=False)
    return Agent(node, settings, Metrics(node), Health())


@pytest.mark.parametrize("is_another_there", [True, False])
def test_an_agent_uninstalls_no_node_of_another(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_another_there: bool
) -> None:
    """It waited all the time, and its own DaemonSet was deleted."""
    node, uninstalled = Node(tmp_path / "bpffs", tmp_path / "state"), list[object]()
    monkeypatch.setattr(commands, "uninstall", lambda *_, **__: uninstalled.append(True))
    server.answer = GONE
    other = FolderLock(node.state_dir)
    assert not is_another_there or other.take()
    agent_of(node)._leave()
    other.release()
    assert uninstalled == ([] if is_another_there else [True])


def test_a_state_folder_that_cannot_be_used_is_no_other_agents(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, uninstalled = Node(tmp_path / "bpffs", tmp_path / "state"), list[object]()
    monkeypatch.setattr(commands, "uninstall", lambda *_, **__: uninstalled.append(True))
    server.answer = GONE
    agent = agent_of(node)
    node.state_dir.touch()
    agent._leave()
    assert uninstalled == [True]


def test_where_no_file_can_be_removed_the_kernel_is_emptied_all_the_same(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unloaded = list[Node]()

    def refuse(*_: object, **__: object) -> NoReturn:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(commands, "uninstall", refuse)
    monkeypatch.setattr(commands, "unload", unloaded.append)
    node = Node(tmp_path / "bpffs", tmp_path / "state")
    server.answer = GONE
    assert agent_of(node)._leave() == 1
    assert unloaded == [node]


def test_an_api_server_that_comes_late_is_waited_for(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kube-proxy starts after us: that is a warning, tried again soon, and said to be over."""
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    task = agent_of(Node(tmp_path / "bpffs", tmp_path / "state"))._daemonset
    failure = task.run(lambda: 0.0)
    assert isinstance(failure, Waiting)
    assert "cannot be asked" in str(failure)
    assert task.due == 5.0
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    assert task.run(lambda: task.due) is None
    assert "cannot be asked" in task.over
    server.answer = FORBIDDEN
    assert isinstance(task.run(lambda: task.due), NotDone)
