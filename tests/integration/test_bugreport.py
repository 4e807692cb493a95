# SPDX-License-Identifier: Apache-2.0
"""`bugreport` of a node with a pod that talks: the pod's sockets are in it, its bytes are not."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path

from install.program import bugreport
from install.program.check.node import Asked
from install.program.installer import Places
from install.program.node import Node
from tests.bed import open_bed, roots
from tests.bed.node import PROGRAM

PAYLOAD = "what-the-application-says"
TALK = f"""
import socket
with socket.create_server(("127.0.0.1", 0)) as listener:
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    client.sendall(b"{PAYLOAD}" * 100)  # and nobody reads it
    print("said", flush=True)
    input()
"""


def test_a_report_of_a_pod_that_talks(tmp_path: Path) -> None:
    archive = tmp_path / "report.tar.gz"
    (tmp_path / "net.d").mkdir()
    (tmp_path / "net.d" / "10-pods.conflist").write_text('{"name": "pods", "token": "opaque"}')
    annotations = {"tcpip-bypass/enabled": "true", "example/secret": "an-annotation"}
    with open_bed() as bed, bed.pod("talker", interception=None, annotations=annotations) as pod:
        pipe = subprocess.PIPE
        talker = pod.spawn([sys.executable, "-c", TALK], stdin=pipe, stdout=pipe)
        assert talker.stdout is not None
        assert talker.stdout.readline() == "said\n"
        argv: list[str | Path] = [PROGRAM, "bugreport", "--output", archive]
        argv += ["--bpffs", bed.node.bpffs, "--state-dir", bed.node.state_dir]
        argv += ["--cni-conf-dir", tmp_path / "net.d"]
        argv += ["--pod", "default/talker", "--pod", "default/nobody"]
        subprocess.run(argv, check=True, timeout=180)
    assert archive.stat().st_mode & 0o777 == 0o600
    with tarfile.open(archive) as found:
        first, *_ = found.getnames()
        assert first == "tcpip-bypass/CONTENTS.txt"
        found.extractall(tmp_path)
    folder = tmp_path / "tcpip-bypass"
    texts = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    for path, text in texts.items():
        for secret in (PAYLOAD, "an-annotation", "opaque"):
            assert secret not in text, path
    status = json.loads(texts[folder / "status.json"])
    assert [each["name"] for each in status["pods"]] == ["talker"]
    assert json.loads(texts[folder / "selftest.json"])["checks"]
    assert json.loads(texts[folder / "check.json"])["findings"]
    assert len(list((folder / "state" / "attachments").iterdir())) == 1
    (sockets,) = json.loads(texts[folder / "sockets" / "default_talker.json"]).values()
    established = [each for each in sockets["sockets"] if each["state"] == "ESTABLISHED"]
    assert len(established) == 2
    assert {each["blocking"] for each in established} == {True}
    assert "no pod default/nobody" in texts[folder / "sockets" / "default_nobody.json"]
    could_not = [path for path, text in texts.items() if text.startswith("could not be had")]
    assert could_not == [folder / "sockets" / "default_nobody.json"]


JOURNALCTL = """\
#!/bin/sh
echo "$0 on a node with $(cat /etc/name): $*"
"""


def test_the_runtimes_log_is_the_nodes(tmp_path: Path) -> None:
    """In a pod there is no journal, and no journalctl: both are in the node's root."""
    root = tmp_path / "root"
    roots.make(root)
    with roots.running(root) as node:
        assert "the node has no journalctl" in bugreport._journal(node.proc)
        program = root / "usr/bin/journalctl"
        program.parent.mkdir(parents=True)
        program.write_text(JOURNALCTL)
        program.chmod(0o755)
        (root / "bin/cat").symlink_to("busybox")
        (root / "etc/name").write_text("a root of its own")
        said = bugreport._journal(node.proc)
        assert said.startswith("/usr/bin/journalctl on a node with a root of its own: ")
        assert "--grep=tcpip-bypass --unit=containerd --unit=crio" in said
        places = Places(tmp_path, tmp_path, tmp_path, node.proc)
        asked = Asked(Node(tmp_path, tmp_path), places, (), root)
        (part,) = [each for each in bugreport._parts(asked) if each.name == "runtime.log"]
        assert part.text() == said
    assert "could not be entered" in bugreport._journal(tmp_path)
