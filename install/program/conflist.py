# SPDX-License-Identifier: Apache-2.0
"""The text of a network configuration: is it valid to a runtime, and how our entry goes in and out.

Entries are cut out of and put into the *text*: whatever else is in the file (key order, numbers
such as 1e3, escapes, duplicate keys, indentation, line ends) stays byte for byte as its owner wrote
it, and taking our entry out again gives the very file from before.

What is valid is what libcni takes: NetworkConfFromBytes and NetworkPluginConfFromBytes in
containernetworking/cni, libcni/conf.go (3f51e88). Texts are UTF-8 decoded with ``surrogateescape``,
because Go's decoder lets bytes that are no UTF-8 pass inside strings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cni_plugin import names
from cni_plugin.protocol import finite, no_constant

Json = dict[str, Any]

CAPABILITIES = {names.CGROUP_PATH: True, names.POD_ANNOTATIONS: True}
_ISTIO_CNI = "istio-cni"
_MULTUS = "multus"
_MADE_FROM = "tcpip-bypass/made-from"  # in a list of our own: the file of the plugin in it
_NO_VERSION = "0.1.0"  # what libcni takes a configuration without cniVersion for
_FLAGS = ("disableCheck", "disableGC", "loadOnlyInlinedPlugins")
_PLUGIN_KEYS = {"name": str, "cniVersion": str, "capabilities": dict, "ipam": dict, "dns": dict}


class ConfError(Exception):
    """Why a configuration is left alone."""


class NotValid(ConfError):
    """A runtime would not take it either."""


@dataclass(frozen=True)
class Entry:
    """What our entry shall hold.

    ``options`` are the operator's; None means that those of an entry that is there stay, or of
    one that was withdrawn: ``withdrawn``. ``folders`` are bpffs and stateDir, as far as they are
    not the defaults.
    """

    options: Json | None
    folders: Json
    withdrawn: Json = field(default_factory=dict)

    def over(self, existing: Json) -> Json:
        """The entry, in place of an existing one."""
        ours = ("type", "capabilities", "bpffs", "stateDir")
        options = self.options
        if options is None:
            options = {key: value for key, value in existing.items() if key not in ours}
        return {"type": names.PLUGIN, "capabilities": CAPABILITIES, **options, **self.folders}


@dataclass(frozen=True)
class _Value:
    """A JSON value, and where it stands in the text."""

    value: Any
    start: int
    end: int


def _integer(text: str) -> int:
    finite(text)
    return int(text)


_DECODER = json.JSONDecoder(parse_float=finite, parse_int=_integer, parse_constant=no_constant)
_SPACE = re.compile(r"[ \t\r\n]*")


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found
    return found.end()


def _parts(text: str, opening: int) -> Iterator[_Value]:
    """What is in the object or array that opens there: elements, or keys and values in turn."""
    at = _after_space(text, opening + 1)
    while text[at] not in "]}":
        value, end = _DECODER.raw_decode(text, at)
        yield _Value(value, at, end)
        at = _after_space(text, end)
        if text[at] in ",:":
            at = _after_space(text, at + 1)


def _members(text: str) -> dict[str, _Value]:
    """The whole text's members; of equal keys the last, as Go has it.

    Raises:
        NotValid: the text is not one JSON object.
    """
    opening = _after_space(text, 0)
    try:
        whole, end = _DECODER.raw_decode(text, opening)
    except (ValueError, RecursionError) as error:
        raise NotValid(f"it is not JSON: {error}") from error
    if text[_after_space(text, end) :]:
        raise NotValid("it is not JSON: something follows the object")
    if not isinstance(whole, dict):
        raise NotValid("it is not a JSON object")
    parts = list(_parts(text, opening))
    return {key.value: value for key, value in zip(parts[::2], parts[1::2], strict=True)}


def _check_plugin(plugin: object) -> None:
    if not isinstance(plugin, dict):
        raise NotValid("a plugin in it is not an object")
    if not isinstance(plugin.get("type"), str) or not plugin["type"]:
        raise NotValid("a plugin in it has no type")
    for key, kind in _PLUGIN_KEYS.items():
        value = plugin.get(key)
        if value is not None and not isinstance(value, kind):
            raise NotValid(f"key {key} of plugin {plugin['type']} is no {kind.__name__}")
    if not all(isinstance(each, bool) for each in (plugin.get("capabilities") or {}).values()):
        raise NotValid(f"a capability of plugin {plugin['type']} is neither true nor false")


@dataclass(frozen=True)
class Conflist:
    """A list of plugins."""

    text: str
    members: dict[str, _Value]
    plugins: tuple[_Value, ...]

    @classmethod
    def parse(cls, text: str) -> Conflist:
        """Any list, even if no runtime would take it.

        Raises:
            NotValid: it is not JSON, or no list of plugins.
        """
        members = _members(text)
        if "plugins" not in members:
            raise NotValid("it has no plugins")
        plugins = members["plugins"]
        if not isinstance(plugins.value, list) or not plugins.value:
            raise NotValid("its list of plugins is empty")
        return cls(text, members, tuple(_parts(text, plugins.start)))

    def check_valid(self) -> None:
        """Raises NotValid, with the reason that a runtime would have."""
        name = self.members.get("name")
        if name is None or not isinstance(name.value, str):
            raise NotValid("it has no name")
        for flag in _FLAGS:
            value = self.members[flag].value if flag in self.members else False
            if str(value).lower() not in ("true", "false"):
                raise NotValid(f"its key {flag} is neither true nor false")
        for plugin in self.plugins:
            _check_plugin(plugin.value)
        _versions(self.members)

    @property
    def name(self) -> str:
        """Of a valid list."""
        return str(self.members["name"].value)

    @property
    def version(self) -> str | None:
        """The newest that a runtime may speak to us in a valid list."""
        spoken = _versions(self.members)
        return max((v for v in names.CNI_VERSIONS if v in spoken), default=None)

    @property
    def made_from(self) -> str | None:
        """Of a list of our own: the name of the file of one plugin that it follows."""
        return str(self.members[_MADE_FROM].value) if _MADE_FROM in self.members else None

    def types(self) -> list[str]:
        """The plugins' types; empty for what is no plugin."""
        values = [each.value for each in self.plugins]
        return [str(v.get("type", "")) if isinstance(v, dict) else "" for v in values]

    def ours(self) -> list[int]:
        """The positions of our entry."""
        return [i for i, each in enumerate(self.types()) if each == names.PLUGIN]

    def unknown_versions(self) -> list[str]:
        """Those that a runtime may speak to us in a valid list, and that we do not."""
        return [each for each in _versions(self.members) if each not in names.CNI_VERSIONS]

    def check_may_be_changed(self) -> None:
        """Raises ConfError when the plugin cannot work in this list, or somebody else makes it."""
        if unknown := self.unknown_versions():
            raise ConfError(
                f"its cniVersion is {unknown[0]}; {names.PLUGIN} can run in a chain of "
                f"{', '.join(names.CNI_VERSIONS)}"
            )
        if _MULTUS in self.types() and not self.ours():
            # Multus without a daemon writes this file anew at each start. The network that it
            # delegates to is the first in a folder, by default this one: it would take a list of
            # ours, and so call itself (getMasterConfigPath in cmd/thin_entrypoint/main.go of
            # k8snetworkplumbingwg/multus-cni, 95a0932). Its daemon skips names that begin
            # with 00-multus (findMasterPlugin in pkg/server/config); its plugin is multus-shim.
            raise ConfError(
                f"{_MULTUS} writes this file itself, and would call itself by a list of ours; if "
                f"its --multus-autoconfig-dir is another folder, write a list of {_MULTUS} and "
                f"{names.PLUGIN} whose name sorts before it"
            )
        if len(self.ours()) == len(self.plugins):
            raise ConfError(f"{names.PLUGIN} is the only plugin in it, and makes no interface")


def _versions(members: dict[str, _Value]) -> tuple[str, ...]:
    """The versions that a runtime may choose: newer libcni goes by cniVersions, older does not."""
    single = members["cniVersion"].value if "cniVersion" in members else None
    if "cniVersion" in members and not isinstance(single, str):
        raise NotValid("its cniVersion is not a string")
    several = members["cniVersions"].value if "cniVersions" in members else []
    if not isinstance(several, list) or not all(isinstance(each, str) for each in several):
        raise NotValid("its cniVersions is not a list of strings")
    try:
        newest = max(several, key=_numbers, default=None)
    except ValueError as error:
        raise NotValid(f"its cniVersions cannot be read: {error}") from error
    found = tuple(each for each in (single, newest) if each)
    return found or (_NO_VERSION,)


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def list_of_single(text: str, file_name: str) -> str:
    """A configuration of one plugin, as the list that a runtime makes of it.

    After ConfListFromConf in libcni: the plugin stays whole, name and version stand above it. A
    network without a name gets its file's, as CRI-O has it (loadNetworks in cri-o/ocicni 18fd1eb).
    A key that no runtime knows says of which file the list is.

    Raises:
        NotValid: the text is not one plugin's configuration.
    """
    members = _members(text)
    start = _after_space(text, 0)
    body = text[start:].rstrip(" \t\r\n")
    _check_plugin(_DECODER.decode(body))
    name = members.get("name")
    named = text[name.start : name.end] if name and name.value else json.dumps(file_name)
    heads = [f'"name": {named}']
    if version := members.get("cniVersion"):
        heads.append('"cniVersion": ' + text[version.start : version.end])
    heads.append(f'"{_MADE_FROM}": {json.dumps(file_name)}')
    tail = text[start + len(body) :]
    if "\n" not in body:
        return f'{{{", ".join(heads)}, "plugins": [{body}]}}{tail}'
    style = _Style.of(text, body)
    indented = re.sub(r"\n(?=[^\r\n])", "\n" + 2 * style.unit, body)
    lines = [
        "{",
        *(f"{style.unit}{head}," for head in heads),
        f'{style.unit}"plugins": [',
        f"{2 * style.unit}{indented}",
        f"{style.unit}]",
        "}",
    ]
    return style.newline.join(lines) + tail


@dataclass(frozen=True)
class _Style:
    """How the owner of a text lays out a plugin that goes over several lines."""

    newline: str
    base: str  # before its closing brace
    unit: str  # one step of indentation

    @classmethod
    def of(cls, text: str, body: str) -> _Style:
        margins = [_margin(line) for line in body.split("\n")[1:] if line.strip()]
        base, inner = margins[-1], margins[0]
        unit = inner.removeprefix(base) if inner.startswith(base) else ""
        return cls("\r\n" if "\r\n" in text else "\n", base, unit or "  ")


def _margin(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" \t"))]


def _rendered(entry: Json, text: str, beside: _Value) -> str:
    """Our entry, in the form of the plugin that it stands beside."""
    body = text[beside.start : beside.end]
    if "\n" not in body:
        loose = re.search(r'":\s', body) or re.search(r'",\s', body)
        return json.dumps(entry, separators=(", ", ": ") if loose else (",", ":"))
    style = _Style.of(text, body)
    return json.dumps(entry, indent=style.unit).replace("\n", style.newline + style.base)


def _inserted(chain: Conflist, entry: Json, behind: int) -> str:
    """The entry behind the plugin at that position."""
    beside = chain.plugins[behind]
    before = chain.text[: beside.start]
    gap = before[len(before.rstrip(" \t\r\n")) :]
    if not gap and "\n" in chain.text[beside.start : beside.end]:
        gap = " "
    new = "," + gap + _rendered(entry, chain.text, beside)
    return chain.text[: beside.end] + new + chain.text[beside.end :]


def _cut(chain: Conflist, position: int) -> str:
    """Without that plugin and the comma it needed."""
    this = chain.plugins[position]
    if position:
        return chain.text[: chain.plugins[position - 1].end] + chain.text[this.end :]
    return chain.text[: this.start] + chain.text[chain.plugins[1].start :]


def with_entry(text: str, entry: Entry) -> str:
    """Our entry once, with these options: behind istio-cni when that is there, else last.

    An entry that is there keeps its place, before or after istio-cni, and its text when it says
    the same.

    Raises:
        NotValid: a runtime would not take the list.
        ConfError: the plugin cannot work in this list.
    """
    chain = Conflist.parse(text)
    chain.check_valid()
    chain.check_may_be_changed()
    ours = chain.ours()
    existing = chain.plugins[ours[0]].value if ours else entry.withdrawn
    while len(ours) > 1 or ours == [0]:
        chain = Conflist.parse(_cut(chain, ours[-1]))
        ours = chain.ours()
    wanted = entry.over(existing)
    if not ours:
        istio = [i for i, each in enumerate(chain.types()) if each.endswith(_ISTIO_CNI)]
        return _inserted(chain, wanted, istio[-1] if istio else -1)
    this = chain.plugins[ours[0]]
    if this.value == wanted:
        return chain.text
    rendered = _rendered(wanted, chain.text, this)
    return chain.text[: this.start] + rendered + chain.text[this.end :]


def without_entry(text: str) -> str:
    """The list without us; it may be one that no runtime takes.

    Raises:
        NotValid: it is no list of plugins.
        ConfError: nothing would be left of it.
    """
    chain = Conflist.parse(text)
    while ours := chain.ours():
        if len(ours) == len(chain.plugins):
            raise ConfError(f"{names.PLUGIN} is the only plugin in it; delete it by hand")
        chain = Conflist.parse(_cut(chain, ours[-1]))
    return chain.text


def made_anew(text: str, fresh: str) -> str:
    """A list of our own, with its plugin as it is in the fresh one, which has no other.

    What stands behind that plugin stays: our entry, and what others have put there. The text stays,
    too, when it says the same.

    Raises:
        NotValid: one of them is no list of plugins.
    """
    if text == fresh:
        return text
    anew, old = Conflist.parse(fresh), Conflist.parse(text)
    for each, kind in list(zip(old.plugins, old.types(), strict=True))[1:]:
        if kind not in ("", anew.types()[0]):
            anew = Conflist.parse(_inserted(anew, each.value, -1))
    return text if is_same(text, anew.text) else anew.text


def is_same(text: str, other: str) -> bool:
    """Whether two lists say the same, wherever they are from. Raises NotValid."""
    one, two = (
        {key: each.value for key, each in _members(each).items() if key != _MADE_FROM}
        for each in (text, other)
    )
    return one == two
