# SPDX-License-Identifier: Apache-2.0
"""`make image-test`: builds the image and lets the DaemonSet's container do its work."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
from importlib import metadata
from pathlib import Path

from cni_plugin import names
from install.program import VERSION
from tests import manifests
from tests.bed import roots
from tests.bed.bed import REPOSITORY
from tests.image.container import Answer, ScratchNode, scratch_node
from tests.image.dockerfile import Builder

DOCKERFILE = REPOSITORY / "install" / "Dockerfile"
STORE = REPOSITORY / "build" / "image"
CONFLIST = {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "bridge"}]}
GIVEN = {"REVISION": "0123abc", "CREATED": "2026-01-31T08:15:00Z"}
LARGEST = 12


def main() -> None:
    """Stops with a traceback at the first thing that is not as it should be."""
    began = time.monotonic()
    image = Builder(REPOSITORY, STORE).build(DOCKERFILE, GIVEN)
    print(f"built in {time.monotonic() - began:.0f} s, {len(image.layers)} layers")
    with scratch_node(image) as node:
        print_size(node.disk / "root")
        check_papers(node.disk / "root", dict(image.labels))
        check(node)
        check_plugin(node.disk / "root" / "usr" / "lib" / names.PLUGIN, node.disk)
    print("the image works")


def check_papers(root: Path, labels: dict[str, str]) -> None:
    """Its labels, and that its SBOM names every package in it."""
    ours = {key.removeprefix("org.opencontainers.image."): text for key, text in labels.items()}
    assert ours.keys() >= {"title", "description", "licenses"}, labels
    assert ours["version"] == VERSION
    assert ours["base.name"].startswith("debian:12-slim@sha256:")
    assert (ours["revision"], ours["created"]) == (GIVEN["REVISION"], GIVEN["CREATED"])
    sbom = json.loads((root / "usr/share/tcpip-bypass/sbom.spdx.json").read_text())
    assert sbom["spdxVersion"] == "SPDX-2.3"
    named = {(each["name"], each["versionInfo"]) for each in sbom["packages"]}
    for stanza in (root / "var/lib/dpkg/status").read_text().split("\n\n"):
        fields = dict(re.findall(r"^(\w+): (.*)$", stanza, re.MULTILINE))
        if fields:
            assert (fields["Package"], fields["Version"]) in named, fields
    libraries = root / "usr/local/lib/python3.11/dist-packages"
    for each in metadata.distributions(path=[str(libraries)]):
        assert any(version == each.version for _, version in named), each.metadata["Name"]
    expected = {"grpcio", "rpds-py", "libpython3.11", "libbpfcc"}  # one of each kind
    assert expected <= {name for name, _ in named}, expected - {name for name, _ in named}
    print(f"SBOM: {len(named)} packages")


def print_size(root: Path) -> None:
    """Of everything in the image, and what takes most of it."""
    du = ["du", "--apparent-size", "--block-size=1M", "--all", str(root)]
    listing = subprocess.run(du, capture_output=True, text=True, check=True).stdout
    sizes = {path: int(size) for size, path in (line.split("\t") for line in listing.splitlines())}
    print(f"{sizes.pop(str(root))} MiB, of which")
    files = [path for path in sizes if Path(path).is_file() and not Path(path).is_symlink()]
    libraries = root / "usr/local/lib/python3.11/dist-packages"
    folders = [f"{root}/usr/include", f"{root}/usr/lib/tcpip-bypass"]
    folders += [str(path) for path in libraries.iterdir() if path.is_dir()]
    for path in sorted([*files, *folders], key=sizes.__getitem__, reverse=True)[:LARGEST]:
        print(f"  {sizes[path]:4} {Path(path).relative_to(root)}")


def check(node: ScratchNode) -> None:
    """The container installs and loads on a node, is found there, and leaves it as it was."""
    before = content(node)
    (node.volume("cni-conf") / "10-pods.conflist").write_text(json.dumps(CONFLIST))
    verdict = json.loads(node.run("selftest", "--json").printed)
    print(f"self-test: {verdict['mode']} {verdict['reasons']}")
    assert verdict["mode"] != "off", verdict
    arguments = manifests.arguments(manifests.documents(manifests.DAEMONSET))
    print(good(node.run(*arguments, "--once")).said)
    status = json.loads(node.run("status", "--json").printed)
    assert status["loaded"], status
    print(node.run("status").printed)

    with socket.socket(socket.AF_UNIX) as nobody_listens:
        nobody_listens.bind(str(node.volume("containerd") / "containerd.sock"))
    answer = node.run("gc", "--adopt")
    assert "UNAVAILABLE" in answer.said, answer  # grpc's own word: its libraries are there

    plugins = json.loads((node.volume("cni-conf") / "10-pods.conflist").read_text())["plugins"]
    assert [each["type"] for each in plugins] == ["bridge", "tcpip-bypass"], plugins
    version = subprocess.run(
        [node.volume("cni-bin") / "tcpip-bypass"],
        env={"CNI_COMMAND": "VERSION"},
        input='{"cniVersion": "1.0.0"}',
        capture_output=True,
        text=True,
        check=True,
    )
    print(f"the plugin, run by the node: {version.stdout.strip()}")

    good(node.run("uninstall", "--purge", "--host-proc=/host/proc"))
    assert json.loads((node.volume("cni-conf") / "10-pods.conflist").read_text()) == CONFLIST
    (node.volume("cni-conf") / "10-pods.conflist").unlink()
    assert content(node) == before


def check_plugin(plugin: Path, folder: Path) -> None:
    """The plugin runs on nodes without a C library, and on those with another one."""
    for kind in roots.KINDS:
        with roots.running_kind(folder / kind, kind) as node:
            shutil.copytree(plugin, node.bin_dir / "folder")
            (node.bin_dir / names.PLUGIN).symlink_to(f"folder/{names.PLUGIN}")
            call = ["CNI_COMMAND=VERSION"]
            done = node.call(roots.BIN_DIR / names.PLUGIN, stdin="{}", environment=call)
            assert "supportedVersions" in json.loads(done.stdout), (kind, done)
            assert node.call(roots.BIN_DIR / "folder" / "plugin", environment=call).returncode
            print(f"the plugin runs: {kind}")


def content(node: ScratchNode) -> set[Path]:
    """What is in the folders that the node shares with the container."""
    shared = ("bpffs", "cni-bin", "cni-conf", "state")
    return {path for volume in shared for path in node.volume(volume).rglob("*")}


def good(answer: Answer) -> Answer:
    """The answer, if the container ended well."""
    assert answer.status == 0, answer
    return answer


if __name__ == "__main__":
    main()
