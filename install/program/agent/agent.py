# SPDX-License-Identifier: Apache-2.0
"""The agent: makes a node right, keeps it so, and knows when to leave it.

It sleeps until a signal, inotify or a slow look around wakes it. What takes memory (the compiler,
the self-test, grpc) is a child process, and is a command that an operator could give as well.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from install.program import ROOT, commands, installer, joiner, log, pauses
from install.program import switch as switches
from install.program.agent import bpffs, child
from install.program.agent.http import Health, Server
from install.program.agent.kubernetes import Question
from install.program.agent.metrics import Metrics
from install.program.agent.schedule import NotDone, Task, Waiting
from install.program.agent.watch import Watch
from install.program.conf_dir import ConfDir
from install.program.conflist import Entry
from install.program.freshness import reason_to_load, reason_to_publish
from install.program.in_force import in_force
from install.program.installer import Places, Withdrawn
from install.program.lock import FolderLock
from install.program.node import Node
from install.program.plugin_files import DoesNotRun, InstallError
from install.program.switch import Switch, SwitchError

LOOK_S = 60.0  # how often the loop comes round when nothing happens
FILES_S = 120.0  # 150 ms each, to read the plugin's 23 MB and to try it
SANDBOXES_S = 900.0  # 300 ms each, for a child that asks the runtime
SETTLE_S = 0.2  # events come in groups
RUNTIME_SETTLE_S = 2.0  # a runtime that has just made its socket reads its own state first
LOCK_POLL_S = 1.0
JOINER_PATIENCE_S = 5.0  # to end when it is told to
LOAD_S = 900.0  # more than the self-test's own time-outs
GC_S = 300.0  # a runtime that hangs
DAEMONSET_S = 86_400.0


@dataclass(frozen=True)
class Settings:
    """What the agent was told."""

    places: Places
    entry: Entry
    load_options: list[str]  # of the children that it runs
    gc_options: list[str]
    join_options: list[str]
    cri_sockets: tuple[Path, ...]  # the first one that is there
    question: Question | None  # None: SIGTERM never means that we are to leave for good
    switch_dir: Path | None  # where the cluster's switch is mounted
    once: bool


class Agent:
    """One run of the agent on one node."""

    def __init__(self, node: Node, settings: Settings, metrics: Metrics, health: Health) -> None:
        self._node, self._settings = node, settings
        self._metrics, self._health = metrics, health
        health.remarks = self._remarks
        self._lock = FolderLock(node.state_dir)
        self._watch = Watch()
        self._stopped, self._stop = os.pipe()
        self._at_end = contextlib.ExitStack()
        self._serve: Callable[[], Server] | None = None  # until the server runs
        self._is_port_taken = False
        self._leaving = False
        self._was_loaded = False
        self._second_look = False
        self._conf_problems: set[str] = set()
        self._runtime: tuple[Path, int, int] | None = None
        self._joiner: subprocess.Popen[bytes] | None = None
        self._joiner_began = 0.0
        self._joiner_watch: int | None = None  # a pidfd, until it has ended
        self._switch = Task("switch", self._keep_switch, LOOK_S, 1.0, 10.0)
        self._programs = Task("programs", self._keep_programs, LOOK_S, 5.0, 600.0)
        self._files = Task("files", self._keep_files, FILES_S, 0.25, 60.0)
        self._sandboxes = Task("sandboxes", self._keep_sandboxes, SANDBOXES_S, 5.0, 300.0)
        self._joining = Task("joiner", self._keep_joiner, LOOK_S, 1.0, 60.0)
        self._daemonset = Task("daemonset", self._know_daemonset, DAEMONSET_S, 5.0, 600.0)
        # The switch first: what it forbids must not happen at the start, either.
        self._tasks = (
            self._switch,
            self._programs,
            self._files,
            self._sandboxes,
            self._joining,
            self._daemonset,
        )

    def run(self, serve: Callable[[], Server] | None) -> int:
        """Until it is told to end; the exit status. ``serve`` starts the server, if there is one.

        Raises OSError when it cannot be started for another reason than that its port is taken.
        """
        self._serve = serve
        with self._signals(), self._at_end:
            self._at_end.callback(self._lock.release)  # what it leaves behind must not keep it
            self._own_the_node()
            while not self._leaving:
                for folder in filter(_is_orphaned, self._mounted()):
                    log.error("folder_gone", f"{folder} was removed or made anew; ending")
                    return 1  # a pod that is started again is given the new one
                self._turn()
                if self._settings.once:
                    return int(bool(self._problems()))
                due = min(task.due for task in self._tasks) - time.monotonic()
                self._sleep(due if self._serve is None else min(due, LOCK_POLL_S))
                self._own_the_node()
            self._end_joiner()
            return self._leave()

    def _mounted(self) -> set[Path]:
        """The folders of the node that a pod has a mount of, and that may be made anew there."""
        places = self._settings.places
        runtimes = {socket.parent for socket in self._settings.cri_sockets}
        return {places.conf_dir, places.bin_dir, self._node.state_dir, *runtimes}

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the loop at its next turn, and a child within a second."""

        def leave(number: int, _frame: object) -> None:
            log.info("stopping", f"told to stop by {signal.Signals(number).name}")
            if not self._leaving:
                os.write(self._stop, b"\0")
            self._leaving = True

        before = {each: signal.signal(each, leave) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        """Starts the server, unless it runs or its port is taken. The agent works without it.

        An agent whose pod was deleted by force holds the port for a while, a stranger for ever.
        """
        if self._serve is None:
            return
        try:
            server = self._at_end.enter_context(self._serve())
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if not self._is_port_taken:
                advice = "if it is another program's: --listen, in the chart `port`"
                log.warning("port_taken", f"{error}; tried again; {advice}")
            self._is_port_taken = True
            return
        self._serve = None
        log.info("serving", "probes and metrics are served", at=server.address)

    def _own_the_node(self) -> None:
        """One agent at a time: in a rolling update the new one may come before the old one goes."""
        said = ""
        while not self._leaving:
            self._listen()
            try:
                reason = self._take_lock()
                if not reason:
                    if said:
                        log.info("owning", f"this is over: {said}")
                    return
            except OSError as error:
                reason = f"the state folder cannot be used: {error}"
            if reason != said:
                log.warning("waiting", reason)
            said = reason
            self._health.set_ready([reason])
            self._health.set_started()
            self._sleep(LOCK_POLL_S)

    def _take_lock(self) -> str:
        """Returns why this agent has it not; empty when it has. Raises OSError."""
        if self._lock.take():
            return ""
        return f"another agent is on this node: it holds {self._lock.folder}"

    def _sleep(self, seconds: float) -> None:
        """Until that time is over, something has changed, or a signal has come."""
        waiting = select.poll()
        for fd in (*self._watch.descriptors(), self._stopped):
            waiting.register(fd, select.POLLIN)
        if self._joiner_watch is not None:
            waiting.register(self._joiner_watch, select.POLLIN)
        found = waiting.poll(1000 * max(0.0, min(seconds, LOOK_S)))
        if any(fd == self._joiner_watch for fd, _ in found):
            self._forget_joiner_watch()
            self._joining.wake(time.monotonic())
        self._notice()

    def _notice(self) -> None:
        self._health.beat()
        topics = self._watch.changed()
        for topic, task in (
            ("switch", self._switch),
            ("files", self._files),
            ("programs", self._programs),
        ):
            if topic in topics:
                task.wake(time.monotonic(), SETTLE_S)

    def _turn(self) -> None:
        self._look_at_runtime()
        if self._no_pod_can_start():
            self._do(self._files)  # before a load, which takes its time
        for task in self._tasks:
            self._do(task)
        with contextlib.suppress(OSError):  # a folder that has just gone; there is a next time
            self._watch.watch(self._folders())
        self._health.set_ready(self._problems())
        self._health.set_started()

    def _no_pod_can_start(self) -> bool:
        """Whether the runtime is told to call a plugin that is not there, or is no use any more.

        The second is asked at the agent's start alone: the node was perhaps started with it.
        """
        files, conf = self._settings.places.files, ConfDir(self._settings.places.conf_dir)
        first = self._files.due == 0
        try:
            if (first or not files.link.exists()) and conf.ours() is not None:
                files.check_runs()
        except DoesNotRun:
            return True
        except (InstallError, OSError):  # the task will say
            pass
        return False

    def _do(self, task: Task) -> None:
        if task.due > time.monotonic() or self._leaving:
            return
        failure = task.run(time.monotonic)
        self._health.beat()
        if task.over:
            log.info(f"{task.name}_recovered", f"this is over: {task.over}")
        if failure is None or self._leaving:
            return
        if isinstance(failure, Waiting):
            log.warning(f"{task.name}_waiting", task.problem)
        else:
            log.error(f"{task.name}_failed", task.problem)

    def _problems(self) -> list[str]:
        """Why pods that start now are not accelerated as they should be."""
        # Not among them: the CRI socket and the API server, which new pods do without.
        return [task.problem for task in (self._programs, self._files) if task.problem]

    def _remarks(self) -> list[str]:
        """Why pods that start now are not accelerated, and should not be."""
        folder, state = self._settings.places.conf_dir, self._node.state
        found = []
        with contextlib.suppress(OSError):
            ours = ConfDir(folder).ours()
            try:
                now = in_force(state, ours.entry if ours else {}, ours.path if ours else folder)
            except ValueError as error:
                return [str(error)]
            if now.mode == "off":
                found.append(f"mode is off: {now.reason}")
            if (kept := switches.kept(state)) and kept.switch.paused:
                found.append(f"all bytes go by TCP: the ConfigMap {switches.CONFIGMAP} says so")
        return found

    def _folders(self) -> dict[str, set[Path]]:
        places, node = self._settings.places, self._node
        return {
            "switch": {self._settings.switch_dir} if self._settings.switch_dir else set(),
            "files": {places.conf_dir, places.bin_dir, *places.folders()},
            "programs": {node.bpffs, *(each.folder for each in node.generations.all())},
            "runtime": {socket.parent for socket in self._settings.cri_sockets},
        }

    def _keep_switch(self) -> bool:
        """What the cluster's switch says, kept for the plugin and imposed on what runs."""
        node, folder = self._node, self._settings.switch_dir
        before = switches.kept(node.state)
        wrong = ""
        try:
            wanted = switches.read(folder) if folder else Switch()
        except (SwitchError, OSError) as error:
            # A node that never knew better must not do what the switch may forbid.
            wanted = before.switch if before else Switch(paused=True)
            stands = json.dumps(wanted.as_json())
            wrong = f"the ConfigMap in {folder} is wrong: {error}; until it is mended: {stands}"
        with node.locked():
            pauses.apply(node, switch=wanted)
        self._metrics.set_switch(is_valid=not wrong, is_stop=wanted.is_stop)
        if wanted != (before.switch if before else Switch()):
            log.info("switch", "the cluster's switch has changed", **wanted.as_json())
            self._sandboxes.start_over(time.monotonic())
        if wrong:
            raise NotDone(wrong)
        return True

    def _keep_programs(self) -> bool:
        """This version's programs, loaded for this kernel."""
        node = self._node
        if bpffs.mount(node.bpffs, self._settings.places.host_proc):
            log.warning("bpffs_mounted", "mounted a bpffs, there was none", path=node.bpffs.parent)
        reason = reason_to_load(node)
        if reason is None:
            self._was_loaded = True
            return True
        is_loaded = reason_to_publish(node) is None
        if is_loaded:
            log.info("trying", f"trying the kernel again: {reason}")
        else:
            log.info("loading", f"loading the programs: {reason}")
        try:
            self._child("load", self._settings.load_options, LOAD_S)
        except NotDone:
            self._metrics.failed("pins")
            raise
        if is_loaded and reason_to_load(node) is not None:
            return False  # in vain
        mode, why = node.state.node_mode()
        log.info("loaded", "the programs are loaded", mode=mode, reason=why)
        if self._was_loaded and not is_loaded:
            self._metrics.repaired("pins")
        self._was_loaded = True
        self._second_look = True  # for pods whose ADD has met the load, and that were starting
        self._joining.start_over(time.monotonic())
        self._sandboxes.start_over(time.monotonic())
        return False

    def _keep_joiner(self) -> bool:
        """A joiner that runs, while programs are loaded: without it no connection joins."""
        current = self._node.generations.current()
        if self._joiner is not None:
            status = self._joiner.poll()
            if status is None:
                is_old = time.monotonic() - self._joiner_began > joiner.HUNG_S
                if not (is_old and joiner.is_hung(self._node.state_dir, current)):
                    return True
                status = self._kill_joiner(self._joiner)
            log.warning("joiner_ended", f"the joiner has ended with {status}; starting another")
        if self._settings.once or current is None:
            self._joiner = None
            return True
        command = [
            sys.executable,
            "-m",
            "install.program.cli",
            "join",
            *self._settings.join_options,
        ]
        self._joiner, self._joiner_began = subprocess.Popen(command, cwd=ROOT), time.monotonic()
        self._forget_joiner_watch()
        self._joiner_watch = os.pidfd_open(self._joiner.pid)
        return False

    def _forget_joiner_watch(self) -> None:
        if self._joiner_watch is not None:
            os.close(self._joiner_watch)
            self._joiner_watch = None

    def _kill_joiner(self, hung: subprocess.Popen[bytes]) -> int:
        """One that does nothing any more, perhaps since it was stopped; its exit status."""
        hung.kill()
        try:
            return hung.wait(JOINER_PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise NotDone(f"the joiner, process {hung.pid}, hangs and cannot be killed") from None

    def _end_joiner(self) -> None:
        if self._joiner is not None:
            self._joiner.terminate()
            try:
                self._joiner.wait(JOINER_PATIENCE_S)
            except subprocess.TimeoutExpired:
                with contextlib.suppress(NotDone):
                    self._kill_joiner(self._joiner)
            self._joiner = None

    def _keep_files(self) -> bool:
        """The plugin and its entry in the network configuration."""
        places = self._settings.places
        try:
            done = installer.install(places, self._settings.entry)
        except (InstallError, OSError) as error:
            self._metrics.failed("plugin" if isinstance(error, InstallError) else "conflist")
            if isinstance(error, DoesNotRun):
                self._note_plugin_problem(str(error))
            if isinstance(error, Withdrawn):
                log.error("entry_withdrawn", str(error), path=places.conf_dir)
            raise
        self._note_plugin_problem("")
        if done.program_changed:
            self._metrics.repaired("plugin")
            log.info("plugin_installed", "installed the plugin", path=places.files.link)
        if done.conf.changed:
            self._metrics.repaired("conflist")
        if done.conf.changed and done.conf.conflist:
            log.info("conflist_changed", "put our entry in", path=done.conf.conflist)
            self._second_look = True  # for pods that were starting
            self._sandboxes.start_over(time.monotonic(), RUNTIME_SETTLE_S)
        if done.conf.conflist is None:
            raise Waiting("; ".join(done.conf.problems))
        for problem in set(done.conf.problems) - self._conf_problems:
            log.warning("conf_problem", problem)
        for problem in self._conf_problems - set(done.conf.problems):
            log.info("conf_problem_over", f"this is over: {problem}")
        self._conf_problems = set(done.conf.problems)
        return not (done.program_changed or done.conf.changed)

    def _note_plugin_problem(self, problem: str) -> None:
        """For `status` and the metrics."""
        with contextlib.suppress(OSError):  # the state folder: it is said there where it is needed
            self._node.note_plugin_problem(problem)

    def _look_at_runtime(self) -> None:
        """A runtime that has been started again has a new socket, and may have forgotten pods."""
        found = next(filter(None, map(_identity, self._settings.cri_sockets)), None)
        if found != self._runtime and found is not None:
            self._sandboxes.start_over(time.monotonic(), RUNTIME_SETTLE_S)
        self._runtime = found

    def _keep_sandboxes(self) -> bool:
        """An attachment for every running pod, and none for those that are gone."""
        if self._runtime is None:
            names = ", ".join(map(str, self._settings.cri_sockets))
            raise Waiting(f"no container runtime: none of {names} is there; name --cri-socket")
        if ConfDir(self._settings.places.conf_dir).ours() is None:
            raise Waiting("our entry is in no network configuration yet")
        socket, *_ = self._runtime
        options = ["--adopt", "--json", "--cri-socket", str(socket), *self._settings.gc_options]
        try:
            done = json.loads(self._child("gc", options, GC_S))
        except NotDone:
            self._metrics.failed("sandbox")
            raise
        log.info("sandboxes_checked", "compared attachments with the runtime's sandboxes", **done)
        for what, count in (("sandbox", done["attached"]), ("attachment", done["removed"])):
            for _ in range(count):
                self._metrics.repaired(what)
        if done["failed"]:
            self._metrics.failed("sandbox")
            raise NotDone(f"{done['failed']} pods or attachments could not be repaired, see above")
        if done["young_s"]:  # of pods that went with a runtime, say: no event wakes us then
            self._sandboxes.look_again(done["young_s"] + SETTLE_S)
        calm = not (done["attached"] or self._second_look)
        self._second_look = False
        return calm

    def _know_daemonset(self) -> bool:
        """Whether it may be asked for, while all is well."""
        if self._settings.question is not None:
            answer = self._settings.question.ask_while_well()
            problem = f"it would not be seen if the DaemonSet was deleted: {answer.why}"
            if answer.status == 0:  # kube-proxy, say, starts after us
                raise Waiting(problem, is_seen=False)
            if answer.status != HTTPStatus.OK:
                raise NotDone(problem)
        return True

    def _child(self, command: str, options: list[str], timeout_s: float) -> str:
        """Runs a command as a child. The tasks `switch` and `files` go on meanwhile."""

        def meanwhile() -> None:
            self._notice()
            self._do(self._switch)
            if self._files.due > 0:  # in the first turn it is not its turn yet
                self._do(self._files)

        return child.run([command, *options], timeout_s, lambda: self._leaving, meanwhile)

    def _leave(self) -> int:
        """A restart, a rolling update or a drained node changes nothing; a removal everything.

        Returns the exit status.
        """
        question = self._settings.question
        if question is None:
            return 0
        answer = question.ask()
        why_not = "" if answer.deleted else answer.why
        if answer.deleted:
            with contextlib.suppress(OSError):  # no agent has a folder that cannot be used
                why_not = self._take_lock()
        if why_not:
            log.info("stopped", f"everything stays as it is: {why_not}")
            return 0
        log.info("leaving", f"taking everything off this node: {answer.why}")
        try:
            commands.uninstall(self._node, self._settings.places, purge=False)
        except OSError as error:
            then = "the plugin stays, without effect; mend that, then install and remove again"
            log.error("not_left", f"our files cannot be taken off this node: {error}; {then}")
            commands.unload(self._node)
            return 1
        log.info("left", "nothing of ours is in use on this node any more")
        return 0


def _identity(socket: Path) -> tuple[Path, int, int] | None:
    """The socket, its inode and when it was made; None when it is not there.

    A file system that is no tmpfs gives the next file the inode of the one just removed.
    """
    with contextlib.suppress(OSError):
        found = socket.stat()
        if stat.S_ISSOCK(found.st_mode):
            return socket, found.st_ino, found.st_mtime_ns
    return None


def _is_orphaned(folder: Path) -> bool:
    """Whether the folder was deleted and is held only by a bind mount on it."""
    with contextlib.suppress(OSError):
        return folder.stat().st_nlink == 0
    return False
