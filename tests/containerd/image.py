# SPDX-License-Identifier: Apache-2.0
"""The sandboxes' image, made by hand: a static busybox that sleeps, in an OCI image layout.

After opencontainers/image-spec, image-layout.md: a tar file with `oci-layout`, `index.json` and
the content, named by its digest. `ctr images import` reads it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
from pathlib import Path
from typing import Any

NAME = "tcpip-bypass.invalid/pause:1"  # a name that nobody can ever be asked for
BUSYBOX = Path("/bin/busybox")  # Debian's and Ubuntu's busybox-static
GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
MEDIA_TYPE = "application/vnd.oci.image"


def write(path: Path) -> None:
    """Write the image to path.

    Raises:
        FileNotFoundError: busybox-static is not installed.
    """
    content: dict[str, bytes] = {}

    def kept(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        content[f"blobs/sha256/{digest}"] = data
        return {
            "mediaType": f"{MEDIA_TYPE}.{kind}",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }

    layer = _tar({"bin/busybox": BUSYBOX.read_bytes()})
    config = {
        "architecture": GO_ARCHITECTURES[platform.machine()],
        "os": "linux",
        "config": {"Entrypoint": ["/bin/busybox", "sleep", "2147483647"]},
        "rootfs": {
            "type": "layers",
            "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"],
        },
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{MEDIA_TYPE}.manifest.v1+json",
        "config": kept("config.v1+json", _json(config)),
        "layers": [kept("layer.v1.tar+gzip", gzip.compress(layer, compresslevel=1))],
    }
    entry = kept("manifest.v1+json", _json(manifest))
    entry["annotations"] = {"io.containerd.image.name": NAME}
    content["oci-layout"] = _json({"imageLayoutVersion": "1.0.0"})
    content["index.json"] = _json({"schemaVersion": 2, "manifests": [entry]})
    path.write_bytes(_tar(content))


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o755
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
