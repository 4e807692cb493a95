# SPDX-License-Identifier: Apache-2.0
"""Asks the API server whether the agent is to leave the node for good.

Every pod of a DaemonSet gets the same SIGTERM: for a rolling update, a drained node, a node that
is shut down, a failing probe, and because the DaemonSet was deleted. Only the API server knows
which; and when it does not say for certain, everything stays as it is.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 5  # for each step of a call
REFUSED_S = 5
REFUSALS = (http.client.UNAUTHORIZED, http.client.FORBIDDEN)
LONGEST_ANSWER = 2**20


@dataclass(frozen=True)
class DaemonSet:
    """The DaemonSet that this agent belongs to."""

    namespace: str
    name: str

    @classmethod
    def parse(cls, text: str) -> DaemonSet:
        """NAMESPACE/NAME; raises ValueError."""
        namespace, slash, name = text.partition("/")
        if not (namespace and slash and name) or not f"{namespace}{name}".isprintable():
            raise ValueError(f"{text!r} is not NAMESPACE/NAME")
        return cls(namespace, name)

    @property
    def path(self) -> str:
        return f"/apis/apps/v1/namespaces/{self.namespace}/daemonsets/{self.name}"


@dataclass(frozen=True)
class Answer:
    """What the API server says; ``status`` is HTTP's, 0 when there was no answer."""

    status: int
    deleted: bool
    why: str


class Question:
    """Is our DaemonSet being deleted?"""

    def __init__(self, daemonset: DaemonSet) -> None:
        self._daemonset = daemonset
        self._was_allowed = False

    def ask_while_well(self) -> Answer:
        """Asks while all is well, and keeps whether we may ask."""
        answer = _ask(self._daemonset)
        if answer.status:
            self._was_allowed = answer.status == http.client.OK
        return answer

    def ask(self) -> Answer:
        """Takes REFUSED_S and twice TIMEOUT_S at most.

        `kubectl delete -f` deletes the role and its binding in the same second as the DaemonSet.
        So when the API server itself forbids, and goes on forbidding, what it told us before,
        that is an answer, too. A refused token is none: it ends with its pod, for any reason.
        """
        deadline = time.monotonic() + REFUSED_S
        while True:
            answer = _ask(self._daemonset)
            if not (self._was_allowed and answer.status == http.client.FORBIDDEN):
                return answer
            if time.monotonic() > deadline:
                return Answer(answer.status, True, f"our access was taken away: {answer.why}")
            time.sleep(1)


def _ask(daemonset: DaemonSet) -> Answer:
    try:
        status, body = _get(daemonset.path, os.environ)
        return _judge(daemonset, status, body)
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        return Answer(0, False, f"the API server cannot be asked: {type(error).__name__}: {error}")


def _get(path: str, environment: Mapping[str, str]) -> tuple[int, bytes]:
    """One GET as the pod's service account; raises what the network, TLS and files raise."""
    token = (SERVICE_ACCOUNT / "token").read_text(encoding="ascii").strip()
    connection = http.client.HTTPSConnection(
        environment["KUBERNETES_SERVICE_HOST"],
        int(environment.get("KUBERNETES_SERVICE_PORT", "443")),
        timeout=TIMEOUT_S,
        context=ssl.create_default_context(cafile=str(SERVICE_ACCOUNT / "ca.crt")),
    )
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        return answer.status, answer.read(LONGEST_ANSWER)
    finally:
        connection.close()


def _judge(daemonset: DaemonSet, status: int, body: bytes) -> Answer:
    """Raises ValueError for an answer that is not the API server's."""
    document = json.loads(body)
    if not isinstance(document, dict):
        raise ValueError("the answer is not a JSON object")
    # A 404 without these is about the path: a proxy's, or a server without that interface.
    subject = document.get("details") or {}
    found = (subject.get("kind"), subject.get("name"))
    if status == http.client.NOT_FOUND and found == ("daemonsets", daemonset.name):
        return Answer(status, True, "the DaemonSet is gone")
    if status == http.client.OK and document.get("kind") == "DaemonSet":
        since = (document.get("metadata") or {}).get("deletionTimestamp")
        why = f"the DaemonSet is being deleted since {since}" if since else "it is still wanted"
        return Answer(status, bool(since), why)
    if status in REFUSALS and document.get("kind") == "Status":
        return Answer(status, False, f"access refused: {document.get('message', '')!s:.200}")
    return Answer(0, False, f"the API server answered {status}: {document.get('message')!s:.200}")
