# SPDX-License-Identifier: Apache-2.0
"""`bugreport`: what comes first, and what never comes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from install.program import bugreport, log
from install.program.agent import cri_pb2, cri_pb2_grpc
from install.program.bugreport import Part
from install.program.check.node import Asked
from install.program.host import OWN_PROC
from install.program.installer import Places
from install.program.node import Node

TOKEN = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl"


def fail() -> str:
    raise OSError(5, "Input/output error")


def unpacked(data: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        return {
            each.name: (archive.extractfile(each) or io.BytesIO()).read().decode()
            for each in archive.getmembers()
        }


def test_the_list_of_contents_comes_first() -> None:
    file = io.BytesIO()
    parts = [Part("a.txt", "the first", lambda: "text"), Part("b.txt", "broken", fail)]
    bugreport.write(parts, file)
    found = unpacked(file.getvalue())
    assert list(found) == [f"tcpip-bypass/{name}" for name in ("CONTENTS.txt", "a.txt", "b.txt")]
    listing = found["tcpip-bypass/CONTENTS.txt"]
    assert "the first" in listing
    assert "No byte that a connection" in listing
    assert "could not be had: OSError: [Errno 5]" in found["tcpip-bypass/b.txt"]


@pytest.mark.parametrize(
    "text",
    [
        f"token={TOKEN} end",
        f"Authorization: Bearer {TOKEN}",
        "Bearer opaque-secret",
        "https://admin:opaque-secret@registry/x",
        "-----BEGIN PRIVATE KEY-----\nopaque-secret\n-----END PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nopaque-secret",
    ],
)
def test_credentials_are_removed_wherever_they_stand(text: str) -> None:
    found = bugreport.without_secrets(text)
    assert TOKEN not in found
    assert "opaque-secret" not in found
    assert "(removed)" in found


def test_credentials_in_a_configuration(tmp_path: Path) -> None:
    conf = tmp_path / "10-calico.conflist"
    plugin = {
        "type": "calico",
        "kubernetes": {"kubeconfig": "/etc/kubeconfig", "k8s_auth_token": "opaque"},
        "policy": {"type": "k8s", "etcd_key_file": "/x", "password": ["opaque"]},
    }
    conf.write_text(json.dumps({"name": "pods", "plugins": [plugin]}))
    text = bugreport._configuration(conf)()
    assert "opaque" not in text
    (found,) = json.loads(text)["plugins"]
    assert (found["type"], found["kubernetes"]["kubeconfig"]) == ("calico", "/etc/kubeconfig")
    conf.write_text('{"password": "opaque", ')
    assert "opaque" not in bugreport._configuration(conf)()


class Containerd(cri_pb2_grpc.RuntimeServiceServicer):
    """Answers as the real one does, without sandboxes."""

    def Version(self, _request: Any, _context: Any) -> Any:
        return cri_pb2.VersionResponse(runtime_name="containerd", runtime_version="v2.1.4")


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[Path]:
    """The socket of a runtime that answers."""
    socket = tmp_path / "cri.sock"
    server = grpc.server(ThreadPoolExecutor(1))
    cri_pb2_grpc.add_RuntimeServiceServicer_to_server(Containerd(), server)
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    yield socket
    server.stop(None).wait()


def versions(root: Path, sockets: tuple[Path, ...] = ()) -> dict[str, Any]:
    node, places = Node(root / "bpffs", root / "state"), Places(root, root, root, OWN_PROC)
    parts = bugreport._parts(Asked(node, places, sockets, root))
    (part,) = [each for each in parts if each.name == "versions.json"]
    found: dict[str, Any] = json.loads(part.text())
    return found


@pytest.mark.parametrize("link", [None, "../usr/lib/os-release", "/usr/lib/os-release", "/nowhere"])
def test_versions_are_the_nodes(tmp_path: Path, runtime: Path, link: str | None) -> None:
    """In a pod, /etc/os-release is the image's; a node's may be a link, in the node's own root."""
    for folder in ("etc", "usr/lib"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "usr/lib/os-release").write_text("ID=the-nodes\n")
    if link:
        (tmp_path / "etc/os-release").symlink_to(link)
    found = versions(tmp_path, (runtime,))
    assert (found["os"], found["runtime"]) == ("ID=the-nodes\n", "containerd v2.1.4")


def test_a_node_without_a_runtime_and_one_whose_runtime_hangs_up(tmp_path: Path) -> None:
    found = versions(tmp_path)
    assert (found["os"], "no container runtime" in found["runtime"]) == ("", True)
    socket = tmp_path / "old.sock"
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_insecure_port(f"unix:{socket}")
    server.start()
    assert "UNIMPLEMENTED" in versions(tmp_path, (socket,))["runtime"]
    server.stop(None).wait()


def test_the_agents_log_is_kept_in_two_files(tmp_path: Path) -> None:
    tail = log.Tail(tmp_path, ("old", "new"), limit=100)
    for number in range(20):
        tail.write(b"line %02d of the log\n" % number)
    kept = (tmp_path / "old").read_text() + (tmp_path / "new").read_text()
    assert kept.endswith("line 19 of the log\n")
    lines = kept.splitlines()
    assert lines == [f"line {number:02} of the log" for number in range(20 - len(lines), 20)]
    assert sum(each.stat().st_size for each in tmp_path.iterdir()) < 300
    for each in tmp_path.iterdir():
        each.unlink()
    for _ in range(20):  # after an uninstall: they stay away
        tail.write(b"one more line\n")
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_kept_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    log.Tail(tmp_path / "file", ("old", "new")).write(b"line\n")
