# SPDX-License-Identifier: Apache-2.0
"""What lies in conf/ fits the plugin and its documentation."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from cni_plugin import names, netconf, schema
from tests.unit.cases import ROOT

OF_THE_SPECIFICATION = {
    *("cniVersion", "cniVersions", "type", "disableCheck", "disableGC", "loadOnlyInlinedPlugins")
}
CONFLISTS = sorted((ROOT / "conf").glob("*.conflist"))


def test_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(json.loads(schema.schema_path().read_text()))


def test_there_is_an_example() -> None:
    assert CONFLISTS


@pytest.mark.parametrize("path", CONFLISTS, ids=lambda path: path.name)
def test_example_is_valid(path: Path, tmp_path: Path) -> None:
    conflist = json.loads(path.read_text())
    (ours,) = [entry for entry in conflist["plugins"] if entry["type"] == names.PLUGIN]
    conf = {**ours, "name": conflist["name"], "cniVersion": conflist["cniVersion"]}
    netconf.refuse_unsupported(conf)
    schema.validate(conf, tmp_path)
    parsed = netconf.parse(conf)
    assert parsed.state_dir == names.STATE_DIR
    assert (9999, 9999) in parsed.exclude_ports


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "cni.md").read_text()
    keys = json.loads(schema.schema_path().read_text())["properties"].keys()
    for key in keys - OF_THE_SPECIFICATION:
        assert f"`{key}`" in text, key
    for name in (names.ENABLED, names.PROXY_ONLY, names.EXCLUDE_PORTS, names.PROXY_UID_OF_POD):
        assert f"`{name}`" in text
