# SPDX-License-Identifier: Apache-2.0
"""Validation of the configuration by jsonschema, which most calls can skip.

Importing jsonschema takes about 60 ms, more than the rest of the plugin together, and a
configuration hardly ever changes. So a configuration that jsonschema has accepted is kept, word
for word, in the state folder (a tmpfs, gone with the node's boot). One that is found there is not
validated again. Keys that differ from call to call are left out.
"""

from __future__ import annotations

import contextlib
import json
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from cni_plugin import log, names
from cni_plugin.protocol import InvalidConfig

if TYPE_CHECKING:
    from cni_plugin.protocol import Json

_PER_CALL = ("runtimeConfig", "prevResult", "args")
_RESERVED_PREFIX = "cni.dev/"


def schema_path() -> Path:
    """conf/schema.json, in the frozen folder or in the source tree."""
    root = getattr(sys, "_MEIPASS", None) or Path(__file__).parent.parent
    return Path(root) / "conf" / "schema.json"


def validate(conf: Json, state_dir: Path) -> None:
    """Raises InvalidConfig that lists every violation."""
    static = {
        key: value
        for key, value in conf.items()
        if key not in _PER_CALL and not key.startswith(_RESERVED_PREFIX)
    }
    schema = schema_path().read_text(encoding="utf-8")
    # Schema and configuration are compared word for word; the name only has to spread.
    text = json.dumps([static, schema], sort_keys=True)
    known = state_dir / names.VALIDATED / f"{zlib.crc32(text.encode()):08x}"
    if _holds(known, text):
        return
    _validate_now(static, json.loads(schema))
    _remember(known, text)


def _holds(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == text
    except (OSError, ValueError):
        return False


def _remember(path: Path, text: str) -> None:
    """A state folder that is full or read-only costs time at the next call, no more."""
    part = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except FileNotFoundError:
        pass  # no state folder: no programs are loaded, and no file shall be left behind
    except OSError as error:
        log.say(f"cannot keep that the configuration is valid in {path}: {error}")
        with contextlib.suppress(OSError):
            part.unlink()


def _validate_now(conf: Json, schema: Json) -> None:
    import jsonschema  # noqa: PLC0415 - see this module's docstring

    violations = [
        f"{'.'.join(map(str, error.absolute_path)) or 'configuration'}: {error.message:.200}"
        for error in jsonschema.Draft7Validator(schema).iter_errors(conf)
    ]
    if violations:
        raise InvalidConfig("invalid configuration", "; ".join(sorted(violations)))
    properties = schema["properties"]
    assert isinstance(properties, dict)
    for key in conf.keys() - properties.keys():
        log.say(f"unknown configuration key {key!r} is ignored")
