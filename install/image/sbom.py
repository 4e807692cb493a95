#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""What is in the image, as SPDX 2.3 in JSON, on standard output.

Run in the finished image: Debian's packages as dpkg knows them, the node program's libraries as
their metadata has them, and what is frozen into the plugin: as freeze.sh pins it, and the packages
that its shared libraries are of.

usage: sbom.py LIBRARIES PLUGIN_PACKAGES
    LIBRARIES        the folder of the node program's libraries
    PLUGIN_PACKAGES  a line of dpkg-query for each package that the plugin has libraries of
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import tomllib

OURS = Path(__file__).resolve().parents[2]
FORMAT = r"${binary:Package}\t${Version}\t${Architecture}\n"


def installed() -> str:
    """The distribution's packages in here, a line each."""
    query = ["dpkg-query", "-W", "-f", FORMAT]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout


def debian(lines: str) -> Iterator[tuple[str, str, str]]:
    """Name, version and package URL (ECMA-427) of each package, of lines in FORMAT."""
    for line in lines.splitlines():
        name, version, architecture = line.split("\t")
        name = name.partition(":")[0]
        yield name, version, f"pkg:deb/debian/{name}@{version}?arch={architecture}"


def libraries(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Those of the node program."""
    for each in metadata.distributions(path=[str(folder)]):
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower()
        yield name, each.version, f"pkg:pypi/{name}@{each.version}"


def frozen() -> Iterator[tuple[str, str, str]]:
    """Those in the plugin."""
    for line in (OURS / "install" / "image" / "freeze.sh").read_text().splitlines():
        if pinned := re.fullmatch(r"\t([\w.-]+)==([\w.]+)", line):
            name, version = pinned.groups()
            yield name.lower(), version, f"pkg:pypi/{name.lower()}@{version}"


def our_version() -> str:
    """Ours, which pyproject.toml has."""
    found: str = tomllib.loads((OURS / "pyproject.toml").read_text())["project"]["version"]
    return found


def document(parts: Sequence[tuple[str, str, str]], version: str, created: str) -> dict[str, Any]:
    """The whole document; `parts` are names, versions and package URLs."""
    image: dict[str, Any] = {
        "SPDXID": "SPDXRef-Image",
        "name": "tcpip-bypass",
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "licenseDeclared": "Apache-2.0",
        "primaryPackagePurpose": "CONTAINER",
    }
    packages, relations = [image], []
    for number, (name, of, url) in enumerate(parts):
        identity = f"SPDXRef-Package-{number}"
        reference = {
            "referenceCategory": "PACKAGE-MANAGER",
            "referenceType": "purl",
            "referenceLocator": url,
        }
        packages.append(
            {
                "SPDXID": identity,
                "name": name,
                "versionInfo": of,
                "downloadLocation": "NOASSERTION",
                "externalRefs": [reference],
            }
        )
        relations.append(("SPDXRef-Image", "CONTAINS", identity))
    relations.insert(0, ("SPDXRef-DOCUMENT", "DESCRIBES", "SPDXRef-Image"))
    keys = ("spdxElementId", "relationshipType", "relatedSpdxElement")
    return {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"tcpip-bypass-{version}",
        "documentNamespace": f"urn:tcpip-bypass:image:{version}:{created}",
        "creationInfo": {"created": created, "creators": ["Tool: install/image/sbom.py"]},
        "packages": packages,
        "relationships": [dict(zip(keys, each)) for each in relations],
    }


def main() -> None:
    folder, plugin_packages = map(Path, sys.argv[1:])
    in_plugin = [*debian(plugin_packages.read_text()), *frozen()]
    parts = sorted({*debian(installed()), *libraries(folder), *in_plugin})
    created = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    print(json.dumps(document(parts, our_version(), created), indent=1))


if __name__ == "__main__":
    main()
