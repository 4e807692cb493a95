# SPDX-License-Identifier: Apache-2.0
"""The plugin's own configuration keys, typed and with their defaults filled in.

NamedTuples take the place of the project's frozen dataclasses. Importing ``dataclasses`` costs
this program 8 ms per call, ``typing`` 2.5 ms (frozen, medians of 50).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cni_plugin import names
from cni_plugin.policy import parse_ports
from cni_plugin.protocol import InvalidConfig, UnsupportedField

if TYPE_CHECKING:
    from cni_plugin.protocol import Json

# Keys of the specification that ask for what a chained plugin of this kind cannot do.
_UNSUPPORTED = ("ipam", "ipMasq", "dns")

CONFIGURATION, SWITCH = "the configuration", "the cluster's switch"  # what may name the mode
_SWITCH_KEYS = ("mode", "excludeNamespaces", "excludePorts")


class NetConf(NamedTuple):
    """A configuration that conf/schema.json accepts. Ports are inclusive ranges."""

    bpffs: str
    state_dir: str
    scope: str
    mode: str
    proxy_uid: int
    proxy_uids: tuple[tuple[int, int], ...]  # inclusive: what a pod's annotation may name
    include_namespaces: frozenset[str]  # empty: all
    exclude_namespaces: frozenset[str]
    exclude_ports: tuple[tuple[int, int], ...]


def refuse_unsupported(conf: Json) -> None:
    """Raises UnsupportedField for a key that asks for what this plugin does not do."""
    for key in _UNSUPPORTED:
        if conf.get(key):
            raise UnsupportedField(
                f"unsupported field {key}: {conf[key]!r:.200}",
                "tcpip-bypass changes no addresses, routes or names; "
                f"{key} belongs into the entry of the plugin that makes the interface",
            )


def parse(conf: Json) -> NetConf:
    """``conf`` must have passed schema.validate; raises InvalidConfig for a bad port range."""
    found: dict[str, object] = {
        "bpffs": names.BPFFS,
        "stateDir": names.STATE_DIR,
        "scope": "mesh",
        "mode": "auto",
        "proxyUID": names.PROXY_UID,
        "proxyUIDs": [],
        "includeNamespaces": [],
        "excludeNamespaces": [],
        "excludePorts": [],
        **conf,
    }
    included, excluded = found["includeNamespaces"], found["excludeNamespaces"]
    ports, uid, uids = found["excludePorts"], found["proxyUID"], found["proxyUIDs"]
    assert isinstance(included, list)
    assert isinstance(excluded, list)
    assert isinstance(ports, list)
    assert isinstance(uids, list)
    assert isinstance(uid, (int, float))
    return NetConf(
        bpffs=str(found["bpffs"]),
        state_dir=str(found["stateDir"]),
        scope=str(found["scope"]),
        mode=str(found["mode"]),
        proxy_uid=int(uid),  # 1337.0 is an integer to JSON Schema
        proxy_uids=tuple(_user_range(str(item)) for item in uids),
        include_namespaces=frozenset(included),
        exclude_namespaces=frozenset(excluded),
        exclude_ports=_ports(ports),
    )


def _ports(items: list[object]) -> tuple[tuple[int, int], ...]:
    try:
        return tuple(port_range for item in items for port_range in parse_ports(str(item)))
    except ValueError as error:
        raise InvalidConfig("invalid configuration key excludePorts", str(error)) from error


def _user_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if int(first) > int(last or first) or int(last or first) >= names.NO_UID:
        raise InvalidConfig("invalid configuration key proxyUIDs", f"{text} is no range of users")
    return int(first), int(last or first)


def under_switch(conf: NetConf, switch: Json | None) -> NetConf:
    """The configuration with the cluster's switch on top, as ``State.switch()`` gives it.

    The switch excludes more than the configuration does, and its mode comes first. Raises
    ValueError when it is not what the agent writes: then nothing is known of what is forbidden.
    """
    if switch is None:
        return conf
    try:
        mode, namespaces, ports = (switch[key] for key in _SWITCH_KEYS)
        if mode is not None and mode not in ("auto", *names.MODES):
            raise ValueError(f"mode {mode!r:.40}")
        if not (isinstance(namespaces, list) and isinstance(ports, list)):
            raise ValueError("excludeNamespaces or excludePorts is not a list")
        return conf._replace(
            mode=mode or conf.mode,
            exclude_namespaces=conf.exclude_namespaces.union(namespaces),
            exclude_ports=(*conf.exclude_ports, *parse_ports(",".join(ports))),
        )
    except (KeyError, TypeError, ValueError) as error:
        said = f"the cluster's switch is damaged ({names.SWITCH_JSON} in the state folder)"
        raise ValueError(f"{said}: {error!r}") from error


def mode_named_by(switch: Json | None) -> str:
    """What names the mode of ``under_switch()``, which has accepted this switch."""
    return SWITCH if switch is not None and switch["mode"] else CONFIGURATION


def folders(conf: Json) -> tuple[str, str]:
    """bpffs and state folder of a configuration that need not be valid.

    A mistake in the configuration must not keep a pod from starting, or from ending: so CHECK, DEL
    and GC validate none.
    """
    return (
        _folder(conf.get("bpffs"), names.BPFFS),
        _folder(conf.get("stateDir"), names.STATE_DIR),
    )


def _folder(path: object, default: str) -> str:
    if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
        return default
    # JSON can hold halves of surrogate pairs, which no file name can.
    return path if path.isprintable() else default
