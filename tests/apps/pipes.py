# SPDX-License-Identifier: Apache-2.0
"""A dump through a pipe that ends by half-closing, and rsync to and from its daemon."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.apps import application
from tests.apps.application import Application, Figures
from tests.apps.place import TWO_HOPS, Place
from tests.apps.programs.contract import compare, pattern
from tests.apps.tools import PATIENCE_S, python

DUMPS = (1000, 300_000, 10_000_000)
PAUSE_S = 0.3  # Envoy drops a FIN that comes before it has connected further, over TCP as well
TREE = {f"folder-{number % 5}/file-{number}": number * 997 for number in range(200)}
LARGE = 10_000_000
RSYNCD = """
use chroot = no
reverse lookup = no
[files]
path = {folder}
read only = no
"""


@contextmanager
def serve_half_close(place: Place) -> Iterator[None]:
    """Reads to the end, then sends everything back in pieces, with pauses."""
    with place.front.serving(python("half_close", place.front.listen_port)):
        yield


def check_half_close(place: Place) -> None:
    """What netcat was fed comes back whole after its side is shut down."""
    link = place.front
    folder = link.client.folder("dump")
    sent, got = folder / "sent", folder / "got"
    for size in DUMPS:
        sent.write_bytes(pattern(size))
        sent.chmod(0o644)
        dump = f"cat {sent}; sleep {PAUSE_S}"
        command = f"({dump}) | nc -N {link.destination} {link.port} > {got}"
        link.client.run(["sh", "-c", command], timeout_s=PATIENCE_S)
        compare(got.read_bytes(), pattern(size))


@contextmanager
def serve_rsync(place: Place) -> Iterator[None]:
    """The daemon on an empty folder."""
    end = place.front.server
    folder = end.folder("rsync")
    config = folder / "rsyncd.conf"
    files = end.folder("rsync-files")
    config.write_text(RSYNCD.format(folder=files))
    config.chmod(0o644)
    options = ["--daemon", "--no-detach", f"--port={place.front.listen_port}"]
    with place.front.serving(["rsync", *options, f"--config={config}"]):
        yield


def _tree(place: Place) -> Path:
    """Many small files and a large one, in the client's folder."""
    root = place.front.client.folder("rsync-sent")
    for name, size in {**TREE, "large": LARGE}.items():
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pattern(size))
        path.chmod(0o644)
    for path in (root, *root.iterdir()):
        path.chmod(0o755)
    return root


def check_rsync(place: Place) -> None:
    """A tree up, and down again into another folder."""
    link = place.front
    sent, got = _tree(place), link.client.folder("rsync-got")
    url = f"rsync://{link.address}/files/"
    for source, target in ((f"{sent}/", url), (url, f"{got}/")):
        argv = ["rsync", "-r", "--delete", "--ignore-times", "--whole-file", source, target]
        link.client.run(argv, timeout_s=PATIENCE_S)
    names = [*TREE, "large"]
    same, different, missing = filecmp.cmpfiles(sent, got, names, shallow=False)
    assert len(same) == len(names), (different, missing)


def load_rsync(place: Place, seconds: float) -> Figures:
    """The large file up, again and again, a connection each."""
    link = place.front
    source = _tree(place) / "large"
    copy = f"rsync --ignore-times --whole-file {source} rsync://{link.address}/files/copy"
    timed = "import subprocess, sys, time\nfor _ in range(int(sys.argv[1])):\n"
    timed += " start = time.time(); subprocess.run(sys.argv[2:], check=True)\n"
    timed += " print(time.time() - start)"

    def run(times: int) -> list[float]:
        argv = ["python3", "-c", timed, str(times), *copy.split()]
        return [float(line) * 1e6 for line in link.client.run(argv, timeout_s=120).split()]

    (once,) = run(1)
    taken = run(max(3, round(seconds / once * 1e6)))
    return application.figures(taken, sum(taken) / 1e6, LARGE)


APPLICATIONS = (
    Application(
        "half-close",
        "a dump through netcat, half-closed",
        reader="event loop",
        protocol="tcp",
        serve=serve_half_close,
        check=check_half_close,
        advice="half-closed connections go on over TCP",
        lasting=False,
        hops=TWO_HOPS,
    ),
    Application(
        "rsync",
        "rsync and its daemon",
        reader="event loop",
        protocol="tcp",
        serve=serve_rsync,
        check=check_rsync,
        loads={"10 MB up": load_rsync},
        lasting=False,
        hops=TWO_HOPS,
    ),
)
