# SPDX-License-Identifier: Apache-2.0
"""The CNI execution protocol: environment and stdin in, one JSON document out.

Source: SPEC.md 1.1.0 of containernetworking/cni, sections 2 and 5; where the specification is
silent (how names are checked, code 8, code 999) the reference implementation's behaviour.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cni_plugin import names

if TYPE_CHECKING:
    from collections.abc import Mapping

Json = dict[str, object]

_ALPHANUMERIC = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_NAME_CHARACTERS = _ALPHANUMERIC | frozenset("_.-")
_IFNAME_BYTES = 15  # IFNAMSIZ of linux/if.h without its final zero
_REQUIRED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "GC": ("CNI_PATH",),
    "STATUS": (),
    "VERSION": (),
}
_SINCE = {"CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}


class CniError(Exception):
    """An answer to the runtime that is not a success; ``code`` as in section 5 of the spec."""

    code = 999  # what the reference implementation uses for errors without a code of their own

    def __init__(self, msg: str, details: str = "") -> None:
        super().__init__(f"{msg}: {details}" if details else msg)
        self.msg = msg
        self.details = details


class IncompatibleVersion(CniError):
    code = 1


class UnsupportedField(CniError):
    code = 2


class UnknownContainer(CniError):
    code = 3


class BadEnvironment(CniError):
    code = 4


class IoFailure(CniError):
    code = 5


class DecodingFailure(CniError):
    code = 6


class InvalidConfig(CniError):
    code = 7


class InvalidNetns(CniError):
    code = 8


class TryAgainLater(CniError):
    code = 11


class CheckFailed(CniError):
    """The pod is not accelerated the way ADD left it."""

    code = 100


class GcIncomplete(CniError):
    """Some stale attachments could not be removed."""

    code = 101


class Call(NamedTuple):
    """What the environment says: which command, and for what attachment."""

    command: str
    container_id: str
    netns: str
    ifname: str
    args: dict[str, str]
    netns_override: bool


class Request(NamedTuple):
    """One call with the plugin configuration that came on stdin, decoded but not validated."""

    call: Call
    conf: Json
    version: str
    name: str


def parse_environment(env: Mapping[str, str]) -> Call:
    """Read CNI_*; raises BadEnvironment that names every missing variable at once."""
    command = env.get("CNI_COMMAND", "")
    if not command:
        raise BadEnvironment(
            "required environment variables missing: CNI_COMMAND",
            "this is a CNI plugin: a container runtime sets CNI_COMMAND and writes the "
            "configuration to its standard input",
        )
    if command not in _REQUIRED:
        raise BadEnvironment(
            f"invalid CNI_COMMAND: {command!r}", f"known commands: {', '.join(_REQUIRED)}"
        )
    missing = [name for name in _REQUIRED[command] if not env.get(name)]
    if missing:
        raise BadEnvironment(
            f"required environment variables missing: {', '.join(missing)}",
            f"{command} needs all of {', '.join(_REQUIRED[command])}",
        )
    if "CNI_CONTAINERID" in _REQUIRED[command]:
        _check_container_id(env["CNI_CONTAINERID"])
        _check_ifname(env["CNI_IFNAME"])
    return Call(
        command=command,
        container_id=env.get("CNI_CONTAINERID", ""),
        netns=env.get("CNI_NETNS", ""),
        ifname=env.get("CNI_IFNAME", ""),
        args=_parse_args(env.get("CNI_ARGS", "")),
        netns_override=env.get("CNI_NETNS_OVERRIDE", "").upper() in ("TRUE", "1"),
    )


def _is_name(text: str) -> bool:
    return text[:1] in _ALPHANUMERIC and _NAME_CHARACTERS.issuperset(text)


def _check_container_id(container_id: str) -> None:
    if not _is_name(container_id):
        raise BadEnvironment(
            f"invalid CNI_CONTAINERID: {container_id!r}",
            "it must begin with a letter or digit and hold only letters, digits, '_', '.', '-'",
        )


def _check_ifname(ifname: str) -> None:
    why = ""
    if len(os.fsencode(ifname)) > _IFNAME_BYTES:
        why = f"it is longer than {_IFNAME_BYTES} bytes"
    elif ifname in (".", ".."):
        why = "'.' and '..' are no interface names"
    elif any(c in "/:" or c.isspace() for c in ifname):
        why = "it contains '/', ':' or white space"
    if why:
        raise BadEnvironment(f"invalid CNI_IFNAME: {ifname!r}", why)


def _parse_args(text: str) -> dict[str, str]:
    """CNI_ARGS, ``K=V;K=V``. A bad form fails no pod: little depends on it."""
    pairs = (pair.partition("=") for pair in text.split(";") if "=" in pair)
    return {key.strip(): value.strip() for key, _, value in pairs}


def read_all(fd: int) -> bytes:
    """All of standard input; raises IoFailure."""
    chunks = []
    try:
        while chunk := os.read(fd, 65536):
            chunks.append(chunk)
    except OSError as error:
        raise IoFailure("cannot read the configuration from standard input", str(error)) from error
    return b"".join(chunks)


def no_constant(name: str) -> NoReturn:
    """For NaN and Infinity, which Python reads; raises ValueError."""
    raise ValueError(f"{name} is not JSON")


def finite(text: str) -> float:
    """What Python reads as infinity it would print as that, and Go refuses; raises ValueError."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"number {text:.40} is out of range")
    return value


def decode(data: bytes) -> Json:
    """One JSON object; raises DecodingFailure."""
    try:
        conf = json.loads(data.decode("utf-8"), parse_constant=no_constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise DecodingFailure(
            "cannot decode the configuration on standard input",
            f"{error} ({len(data)} bytes read)",
        ) from error
    if not isinstance(conf, dict):
        raise DecodingFailure(
            "the configuration on standard input is not a JSON object", f"{data[:80]!r}"
        )
    return conf


def version_in_use(conf: Json) -> str:
    """What to answer in, before it is known whether the request is any good."""
    version = conf.get("cniVersion")
    return version if version in names.CNI_VERSIONS else names.NEWEST_CNI_VERSION


def parse_request(call: Call, conf: Json) -> Request:
    """Name and version, as every command but VERSION needs them; raises CniError."""
    name = conf.get("name", "")
    if not isinstance(name, str):
        raise DecodingFailure("key name is not a string", f"name: {json.dumps(name)[:80]}")
    if not name:
        raise InvalidConfig("missing network name", "the configuration has no key name")
    if not _is_name(name):
        raise InvalidConfig(
            f"invalid network name: {name!r}",
            "it must begin with a letter or digit and hold only letters, digits, '_', '.', '-'",
        )
    return Request(call, conf, _version(call.command, conf), name)


def _version(command: str, conf: Json) -> str:
    # A configuration without cniVersion is one of 0.1.0, by the specification of that time.
    version = conf.get("cniVersion") or "0.1.0"
    if not isinstance(version, str):
        raise DecodingFailure(
            "key cniVersion is not a string", f"cniVersion: {json.dumps(version)[:80]}"
        )
    if version not in names.CNI_VERSIONS:
        if command == "DEL":  # it answers nothing, in no version
            return names.NEWEST_CNI_VERSION
        raise IncompatibleVersion(
            f"incompatible CNI version: {version}",
            f"this plugin supports {', '.join(names.CNI_VERSIONS)}; set cniVersion in the conflist",
        )
    since = _SINCE.get(command, version)
    if names.CNI_VERSIONS.index(version) < names.CNI_VERSIONS.index(since):
        raise IncompatibleVersion(
            f"{command} does not exist in CNI version {version}", f"it came with {since}"
        )
    return version


def error_document(error: CniError, version: str) -> Json:
    """The error result; ``version`` is the protocol version in use as far as it is known."""
    document: Json = {"cniVersion": version, "code": error.code, "msg": error.msg}
    if error.details:
        document["details"] = error.details
    return document
