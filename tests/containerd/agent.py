# SPDX-License-Identifier: Apache-2.0
"""The agent on a node of the bed, as its DaemonSet would run it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpf import pins
from cni_plugin import names
from install.program.conf_dir import ConfDir
from tests.bed.bed import FROZEN_PLUGIN, REPOSITORY
from tests.bed.cni import Json
from tests.containerd.bed import PLAIN, RuntimeBed

READY_TIMEOUT_S = 300
END_TIMEOUT_S = 60


@dataclass(frozen=True)
class Release:
    """One version of the program: a source tree and the frozen plugin."""

    source: Path = REPOSITORY
    plugin: Path = FROZEN_PLUGIN

    @classmethod
    def next(cls, folder: Path) -> Release:
        """Another version, which differs in a comment and in a file next to the plugin."""
        for package in ("bpf", "cni_plugin", "conf", "install"):
            shutil.copytree(REPOSITORY / package, folder / "source" / package)
        shutil.copy(REPOSITORY / "pyproject.toml", folder / "source")  # has the version
        with (folder / "source/bpf/tcpip_bypass.c").open("a") as program:
            program.write("/* the next version */\n")
        shutil.copytree(FROZEN_PLUGIN, folder / "plugin")
        (folder / "plugin/VERSION").write_text("next\n")
        return cls(folder / "source", folder / "plugin")


@dataclass
class Agent:
    """The agent's process, and what it has said since it was first started."""

    bed: RuntimeBed
    release: Release = field(default_factory=Release)
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    port: int = 15099
    conf_dir: Path = field(init=False)
    original: str = field(init=False)  # the conflist before we came
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.conf_dir = self.bed.node.folder / "net.d" / PLAIN
        self.original = self.conflist.read_text()

    @property
    def bin_dir(self) -> Path:
        return self.bed.containerd.bin_dir

    @property
    def conflist(self) -> Path:
        return self.conf_dir / "10-pods.conflist"

    @property
    def bpffs(self) -> Path:
        """The folder of the node's pins, as seen from outside of the node."""
        return self.bed.node.inside(Path(names.BPFFS))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def places(self) -> list[str]:
        return [
            *("--cni-conf-dir", str(self.conf_dir), "--cni-bin-dir", str(self.bin_dir)),
            *("--plugin-dir", str(self.release.plugin)),
        ]

    def command(self, command: str, *options: str) -> list[str | Path]:
        """The command line of this release's node program."""
        program = [sys.executable, "-m", "install.program.cli", command]
        return ["env", "--chdir", self.release.source, *program, *options]

    def run(self, command: str, *options: str) -> str:
        """Run a command of this release's node program, and return what it printed."""
        return self.bed.node.run(self.command(command, *options), reporting=command)

    def start(self) -> None:
        """Start it; the node's kernel may allow less than the mode that is tested here."""
        mode = json.dumps({"mode": "full"})
        options = (
            "--listen",
            f"127.0.0.1:{self.port}",
            "--log-format",
            "json",
            "--conf-json",
            mode,
        )
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.bed.node.entering(
                    self.command("agent", *self.places(), *options, *self.options)
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )

    def start_and_wait(self) -> None:
        """Start it and wait until it is ready and has looked after the pods."""
        seen = len(self.events())
        self.start()
        self.wait_until("ready", lambda: self.reasons() == [])
        self.wait_for("sandboxes_checked", since=seen)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit status."""
        assert self._process is not None
        self._process.send_signal(number)
        status = self._process.wait(END_TIMEOUT_S)
        self._process = None
        return status

    def kill(self) -> None:
        """End it, if it runs, without giving it a chance to do anything."""
        if self._process is not None:
            self.end(signal.SIGKILL)

    def reasons(self) -> list[str]:
        """What /readyz says against being ready; also that it does not answer."""
        try:
            status, text = self.get("/readyz")
        except OSError as error:
            return [str(error)]
        return [] if status == 200 else text.splitlines()

    def get(self, path: str) -> tuple[int, str]:
        """HTTP status and body."""
        with self.bed.node.host.entered():
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            connection.connect()
        with closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    @property
    def _log(self) -> Path:
        return self.bed.node.folder / f"agent-{self.port}.log"

    def events(self) -> list[dict[str, Any]]:
        """Its log, line by line; what is no JSON (a traceback, say) is an event of its own."""
        if not self._log.exists():
            return []
        found = []
        for line in self._log.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"event": "noise", "level": "error", "msg": line})
        return found

    def said(self, event: str, since: int = 0) -> list[dict[str, Any]]:
        """Its lines of one kind."""
        return [each for each in self.events()[since:] if each["event"] == event]

    def wait_for(self, event: str, since: int = 0) -> None:
        self.wait_until(f"says {event}", lambda: bool(self.said(event, since)))

    def wait_until(
        self, what: str, condition: Callable[[], bool], timeout_s: float = READY_TIMEOUT_S
    ) -> None:
        """Raises AssertionError with its log when it takes too long, or the agent ends."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if not self.is_running or time.monotonic() > deadline:
                tail = "\n".join(self._log.read_text().splitlines()[-40:])
                raise AssertionError(f"waited in vain until the agent is {what}:\n{tail}")
            time.sleep(0.05)

    def entry(self) -> Json | None:
        """Our entry in the configuration that the runtime uses."""
        ours = ConfDir(self.conf_dir).ours()
        return ours.entry if ours else None

    @property
    def program(self) -> Path:
        """The installed plugin, behind its link."""
        return self.bin_dir / (self.bin_dir / names.PLUGIN).readlink()

    def generations(self) -> list[str]:
        """The pinned generations, and last where `current` leads."""
        current = self.bpffs / pins.CURRENT
        found = sorted(path.name for path in self.bpffs.glob("gen-*"))
        return [*found, current.readlink().name] if current.is_symlink() else found
