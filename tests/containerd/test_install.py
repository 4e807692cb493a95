# SPDX-License-Identifier: Apache-2.0
"""Install and uninstall under a running containerd: it has a network all the time, and uses ours.

What the agent does with the same functions is in test_agent.py; here it is each form that a network
configuration can have, with pods coming and going, and no programs loaded.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from install.program import installer
from install.program.conflist import Entry
from install.program.installer import Places
from tests.bed import cni
from tests.bed.bed import FROZEN_PLUGIN
from tests.containerd import inventory
from tests.containerd.bed import PLAIN, RuntimeBed, open_bare_bed
from tests.containerd.containerd import NETWORK

OURS = Entry(None, {})
RELOAD_S = 10
ROUNDS = 3


@pytest.fixture(scope="module")
def bed() -> Iterator[RuntimeBed]:
    with open_bare_bed() as bed:
        yield bed
        left = bed.leftovers()
        assert not any(left.values()), left


@pytest.fixture
def places(bed: RuntimeBed, request: pytest.FixtureRequest) -> Iterator[Places]:
    """The node with its configuration in one of the forms: not installed before, nor after."""
    conf_dir = bed.node.folder / "net.d" / PLAIN
    places = Places(conf_dir, bed.containerd.bin_dir, FROZEN_PLUGIN, Path("/proc"))
    _write_configuration(bed, conf_dir, request.param)
    before = _links_and_contents(conf_dir)
    yield places
    assert _links_and_contents(conf_dir) == before
    installer.uninstall(places, lambda: None, purge=True)
    assert not places.files.is_there


def _links_and_contents(folder: Path) -> dict[str, tuple[bool, str]]:
    return {path.name: (path.is_symlink(), path.read_text()) for path in folder.iterdir()}


def _write_configuration(bed: RuntimeBed, conf_dir: Path, form: str) -> None:
    bridge = cni.bridge(bed.node.folder / "ipam")
    head = {"cniVersion": "1.0.0", "name": NETWORK}
    single, several = json.dumps({**head, **bridge}), json.dumps({**head, "plugins": [bridge]})
    for path in conf_dir.iterdir():
        path.unlink()
    if form == "single":
        (conf_dir / "10-pods.conf").write_text(single)
    elif form == "link":
        target = bed.node.folder / "pods.conflist"
        target.write_text(several)
        (conf_dir / "link").symlink_to(target)
        (conf_dir / "link").rename(conf_dir / "10-pods.conflist")  # or containerd would not look
    else:
        (conf_dir / "10-pods.conflist").write_text(several)
    _wait_until_ready(bed)


def _wait_until_ready(bed: RuntimeBed) -> None:
    deadline = time.monotonic() + RELOAD_S
    while not bed.cri.is_ready():
        assert time.monotonic() < deadline, bed.containerd.log()[-2000:]
        time.sleep(0.05)


def plugins_called(bed: RuntimeBed, sandbox: str) -> list[str]:
    """The chain that the runtime ran for a sandbox, as libcni keeps it for the DEL."""
    (kept,) = (bed.node.folder / inventory.CNI_RESULTS).glob(f"{NETWORK}-{sandbox}-*")
    conf = json.loads(base64.b64decode(json.loads(kept.read_text())["config"]))
    return [f"{each['type']} {each.get('mtu', '')}".rstrip() for each in conf["plugins"]]


@contextmanager
def always_ready(bed: RuntimeBed, *, but_for: float = 0.0) -> Iterator[None]:
    """Asked over and over, the runtime says that it has a network; but for a part of the answers.

    containerd lists the folder first and reads the file afterwards. One that was taken away in
    between, though another has its place, is no network, until it reads again, which is at once.
    """
    stop, answers = threading.Event(), [0, 0]

    def ask() -> None:
        while not stop.is_set():
            answers[bed.cri.is_ready()] += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert answers[True] > 100
    assert answers[False] <= but_for * answers[True]


def run_until_called(bed: RuntimeBed, name: str, expected: list[str]) -> None:
    """Pods all start; from the runtime's next reload on it is with these plugins."""
    deadline = time.monotonic() + RELOAD_S
    with bed.pod(name, handler=PLAIN) as pod:
        while True:
            sandbox = pod.run_sandbox()
            called = plugins_called(bed, sandbox)
            pod.end_sandbox(sandbox)
            if called == expected:
                return
            assert time.monotonic() < deadline, called


@pytest.mark.parametrize("places", ["list", "single", "link"], indirect=True)
def test_install_and_uninstall_while_pods_come_and_go(
    bed: RuntimeBed, places: Places, request: pytest.FixtureRequest
) -> None:
    removes_a_file = request.node.callspec.params["places"] == "single"
    with (
        always_ready(bed, but_for=0.01 * removes_a_file),
        bed.pod("early", handler=PLAIN) as early,
        bed.pod("old", handler=PLAIN) as old,
    ):
        for _ in range(ROUNDS):
            before = early.run_sandbox()
            done = installer.install(places, OURS)
            assert done.conf.conflist is not None
            run_until_called(bed, "new", ["bridge", "tcpip-bypass"])
            assert plugins_called(bed, before) == ["bridge"]
            early.end_sandbox(before)
            sandbox = old.run_sandbox()
            left = installer.uninstall(places, lambda: None, purge=False)
            assert left.left_stub
            assert left.still_running == []
            run_until_called(bed, "late", ["bridge"])
            assert plugins_called(bed, sandbox) == ["bridge", "tcpip-bypass"]
            old.end_sandbox(sandbox)


@pytest.mark.parametrize("places", ["single"], indirect=True)
def test_owner_rewrites_its_file(bed: RuntimeBed, places: Places) -> None:
    """In place, as Multus' daemon does: the list that the runtime uses follows at the next call."""
    single = places.conf_dir / "10-pods.conf"
    original = single.read_text()
    installer.install(places, OURS)
    run_until_called(bed, "new", ["bridge", "tcpip-bypass"])
    with bed.pod("old", handler=PLAIN) as old:
        sandbox = old.run_sandbox()
        single.write_text(json.dumps({**json.loads(original), "mtu": 1400}))
        assert installer.install(places, OURS).conf.changed
        run_until_called(bed, "rewritten", ["bridge 1400", "tcpip-bypass"])
        old.end_sandbox(sandbox)
    single.write_text(original)
    installer.uninstall(places, lambda: None, purge=True)
    run_until_called(bed, "late", ["bridge"])
