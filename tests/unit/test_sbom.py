# SPDX-License-Identifier: Apache-2.0
"""The image's list of what is in it: whole, and with every reference leading somewhere."""

from __future__ import annotations

from install.image import sbom

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
    parts = [*sbom.debian(DPKG), *sbom.frozen(PIP)]
    document = sbom.document(parts, "1.2.3", "2026-01-31T08:15:00Z")
    identities = [document["SPDXID"], *(each["SPDXID"] for each in document["packages"])]
    assert len(set(identities)) == len(identities)
    for relation in document["relationships"]:
        assert {relation["spdxElementId"], relation["relatedSpdxElement"]} <= set(identities)
    kinds = [each["relationshipType"] for each in document["relationships"]]
    assert kinds == ["DESCRIBES"] + ["CONTAINS"] * (len(document["packages"]) - 1)
    assert document["packages"][0]["versionInfo"] == "1.2.3"
