# SPDX-License-Identifier: Apache-2.0
"""What the node program and the agent say on stderr: one line per event, never more.

A person at a terminal gets the sentence, and which pod it is about ("plain"). A collector of logs
gets every field, as logfmt or as JSON:

    ts=2026-01-31T08:15:00.123Z level=warning event=pod_not_moved msg="..." pod=shop/cart-7d9
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cni_plugin.state import Attachment

FORMATS = ("plain", "logfmt", "json")
LEVELS = ("info", "warning", "error")

_BARE = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII but space, quote, equals sign, backslash
_format = "plain"
_lowest = 0  # index into LEVELS
_tail: Tail | None = None


def setup(style: str, level: str = LEVELS[0]) -> None:
    """From now on lines are written in one of FORMATS, those of this level and graver ones."""
    global _format, _lowest
    _format, _lowest = style, LEVELS.index(level)


class Tail:
    """The last lines in two files of the same folder, for `bugreport`; nothing here ever fails.

    ``files`` are the older and the newer one. When the newer one is full, it becomes the older one.
    Once they have been removed from outside, as `unload` does, nothing is written any more.
    """

    def __init__(self, folder: Path, files: tuple[str, str], limit: int = 128 * 1024) -> None:
        self._older, self._newer = (folder / name for name in files)
        self._limit, self._fd = limit, -1
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            self._fd = os.open(self._newer, flags, 0o600)

    def write(self, line: bytes) -> None:
        with contextlib.suppress(OSError):
            found = os.fstat(self._fd)
            if found.st_nlink and found.st_size >= self._limit:
                self._newer.rename(self._older)
                os.close(self._fd)
                self._open()
            os.write(self._fd, line)


def keep(folder: Path, files: tuple[str, str]) -> None:
    """From now on the last lines are also kept in these files, as far as that can be done."""
    global _tail
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    _tail = Tail(folder, files)


def forget() -> None:
    """Lines are not kept any more: their file has been closed."""
    global _tail
    _tail = None


def info(event: str, message: str, **fields: object) -> None:
    """Say that something happened. `event` names its kind; fields that are None are left out."""
    _say("info", event, message, fields)


def warning(event: str, message: str, **fields: object) -> None:
    """Say that something is wrong which we can go on with; `message` tells what to do."""
    _say("warning", event, message, fields)


def error(event: str, message: str, **fields: object) -> None:
    """Say that something was not done; `message` tells what to do."""
    _say("error", event, message, fields)


def again(line: dict[str, Any]) -> str:
    """Say what a child has said in JSON, as if it was ours, with its time; returns the message.

    Raises KeyError when it is no line of this module's.
    """
    fields = {key: line[key] for key in line.keys() - {"level", "event", "msg"}}
    _say(line["level"], line["event"], line["msg"], fields)
    return str(line["msg"])


def of(attachment: Attachment | None) -> dict[str, str]:
    """The fields that say which pod an event is about."""
    if attachment is None:
        return {}
    pod = f"{attachment.pod_namespace}/{attachment.pod_name}"
    return {"pod": pod, "container": attachment.container_id}


def _say(level: str, event: str, message: str, fields: dict[str, object]) -> None:
    if LEVELS.index(level) < _lowest:
        return
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = {"ts": now, "level": level, "event": event, "msg": message, **fields}
    line = {name: value for name, value in line.items() if value is not None}
    if _format == "json":
        text = json.dumps(line, default=str)
    elif _format == "logfmt":
        text = " ".join(f"{name}={_quoted(value)}" for name, value in line.items())
    else:
        about = f" ({pod})" if (pod := str(fields.get("pod") or "")) not in message else ""
        text = f"{level}: {message}{about}".removeprefix("info: ").replace("\n", " ")
    encoded = text.encode("utf-8", "backslashreplace") + b"\n"
    with contextlib.suppress(OSError):  # a closed or full stderr is no reason to stop
        os.write(2, encoded)
    if _tail:
        _tail.write(encoded)


def _quoted(value: object) -> str:
    """A value that ends where it ends and stays on its line, whatever is in it."""
    text = json.dumps(value) if isinstance(value, bool) else str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)
