# SPDX-License-Identifier: Apache-2.0
"""The image's list of what is in it, whole and consistent; its Dockerfile's build arguments."""

from __future__ import annotations

import re
import shlex

import pytest

from install.image import sbom
from tests.image import dockerfile
from tests.unit.cases import ROOT

PIP = "jsonschema==4.26.0\nPyInstaller==6.22.3\ntyping_extensions==4.16.0\n"
DPKG = "libbpfcc\t0.26.0+ds-1\tamd64\nlibc6:amd64\t2.36-9\tamd64\n"


def test_packages_of_the_plugin() -> None:
    assert list(sbom.frozen(PIP)) == [
        ("jsonschema", "4.26.0", "pkg:pypi/jsonschema@4.26.0"),
        ("pyinstaller", "6.22.3", "pkg:pypi/pyinstaller@6.22.3"),
        ("typing-extensions", "4.16.0", "pkg:pypi/typing-extensions@4.16.0"),
    ]


def test_packages_of_the_distribution() -> None:
    assert list(sbom.debian(DPKG)) == [
        ("libbpfcc", "0.26.0+ds-1", "pkg:deb/debian/libbpfcc@0.26.0+ds-1?arch=amd64"),
        ("libc6", "2.36-9", "pkg:deb/debian/libc6@2.36-9?arch=amd64"),
    ]


def test_every_reference_leads_somewhere() -> None:
    document = sbom.document(
        [*sbom.debian(DPKG), *sbom.frozen(PIP)], "1.2.3", "2026-01-31T08:15:00Z"
    )
    identities = [document["SPDXID"], *(each["SPDXID"] for each in document["packages"])]
    assert len(set(identities)) == len(identities)
    for relation in document["relationships"]:
        assert {relation["spdxElementId"], relation["relatedSpdxElement"]} <= set(identities)
    kinds = [each["relationshipType"] for each in document["relationships"]]
    assert kinds == ["DESCRIBES"] + ["CONTAINS"] * (len(document["packages"]) - 1)
    assert document["packages"][0]["versionInfo"] == "1.2.3"


DOCKERFILE = (ROOT / "install" / "Dockerfile").read_text()
PINNED = "debian:12-slim@sha256:" + 64 * "a"


def bases(**given: str) -> list[str]:
    """What each stage begins with."""
    found = dockerfile.resolved(DOCKERFILE, given)
    return [each.split()[1] for each in found if each.startswith("FROM ")]


def labels(**given: str) -> dict[str, str]:
    (label,) = [e for e in dockerfile.resolved(DOCKERFILE, given) if e.startswith("LABEL ")]
    pairs = (each.partition("=")[::2] for each in shlex.split(label)[1:])
    return {key.removeprefix("org.opencontainers.image."): text for key, text in pairs}


def test_bases_are_pinned_and_by_build_arguments() -> None:
    assert len(set(bases())) == 1
    name, _, digest = bases()[0].partition("@")
    assert name in dockerfile.SUITES
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
    assert bases(DEBIAN_12=PINNED) == [PINNED] * 3
    assert labels(DEBIAN_12=PINNED)["base.name"] == PINNED


def test_labels_say_what_the_image_was_made_of() -> None:
    given = {"REVISION": "0123abc", "CREATED": "2026-01-31T08:15:00Z"}
    found = labels(**given)
    assert (found["revision"], found["created"]) == (given["REVISION"], given["CREATED"])
    assert {"title", "description", "version", "licenses", "base.name"} <= found.keys()
    assert all(text for key, text in found.items())


def test_an_argument_that_nothing_takes_is_refused() -> None:
    with pytest.raises(dockerfile.BuildError, match="DEBIAN_13"):
        bases(DEBIAN_13="debian:13-slim")
    with pytest.raises(dockerfile.BuildError, match="VERSION"):
        list(dockerfile.resolved("FROM debian:12-slim\nARG VERSION=1\nRUN true\n", {}))
