# SPDX-License-Identifier: Apache-2.0
"""prevResult: given back in the configuration's version, and read for the pod's addresses.

Source: SPEC.md of the tags spec-v0.2.0 to 1.1.0, section "Result Types". What differs between
the versions this plugin speaks: ``ips[].version`` exists up to 0.4.0, and mtu, socketPath and
pciID of an interface came later.
"""

from __future__ import annotations

from typing import NamedTuple

from cni_plugin.protocol import InvalidConfig, Json, Request

_NEW_INTERFACE_KEYS = ("mtu", "socketPath", "pciID")
_FAMILIES_0_2 = (("ip4", "4"), ("ip6", "6"))


class PodAddress(NamedTuple):
    """One address of the pod, without its prefix length, and the interface that has it."""

    address: str
    interface: str


def previous(request: Request) -> Json:
    """The configuration's prevResult; raises InvalidConfig when there is none."""
    result = request.conf.get("prevResult")
    if result is None:
        raise InvalidConfig(
            "prevResult is missing: tcpip-bypass must be called as a chained plugin",
            "in the conflist, put its entry behind the plugin that makes the interface",
        )
    if not isinstance(result, dict):
        raise InvalidConfig("prevResult is not a JSON object", f"prevResult: {result!r:.80}")
    return result


def convert(result: Json, version: str) -> Json:
    """``result`` as a result of ``version``: equivalent, unknown keys kept; raises InvalidConfig.

    A result may lack its own cniVersion, and what differs shows in its keys anyway, so this
    goes by the keys found and not by the version claimed.
    """
    converted: Json = {**result, "cniVersion": version}
    if "ip4" in result or "ip6" in result:
        converted = _from_0_2(converted)
    old = version in ("0.3.0", "0.3.1", "0.4.0")
    # A key that was absent, or null as Go prints an empty list, stays as it was.
    if result.get("interfaces") is not None and old:
        converted["interfaces"] = [
            {key: value for key, value in interface.items() if key not in _NEW_INTERFACE_KEYS}
            for interface in _objects(result, "interfaces")
        ]
    if converted.get("ips") is not None:
        converted["ips"] = [_convert_ip(ip, old) for ip in _objects(converted, "ips")]
    return converted


def _convert_ip(ip: Json, old: bool) -> Json:
    bare = {key: value for key, value in ip.items() if key != "version"}
    if not old:
        return bare
    return {"version": "6" if ":" in str(ip.get("address", "")) else "4", **bare}


def _from_0_2(result: Json) -> Json:
    """Results before 0.3.0 hold at most one address of each family, with its routes."""
    converted = {key: value for key, value in result.items() if key not in ("ip4", "ip6")}
    ips: list[Json] = []
    routes: list[Json] = []
    for key, family in _FAMILIES_0_2:
        config = result.get(key)
        if config is None:
            continue
        if not isinstance(config, dict):
            raise InvalidConfig(f"prevResult.{key} is not a JSON object", f"{key}: {config!r:.80}")
        ip: Json = {"version": family, "address": config.get("ip")}
        if config.get("gateway"):
            ip["gateway"] = config["gateway"]
        ips.append(ip)
        routes.extend(_objects(config, "routes"))
    return {**converted, "ips": ips, "routes": routes}


def _objects(result: Json, key: str) -> list[Json]:
    """The list of objects under ``key``, empty when absent; raises InvalidConfig."""
    found = result.get(key)
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise InvalidConfig(
            f"prevResult.{key} is not a list of JSON objects", f"{key}: {found!r:.80}"
        )
    return found


def pod_addresses(result: Json, ifname: str) -> list[PodAddress]:
    """The addresses that the chain gave to the pod itself; raises InvalidConfig.

    Left out are those of interfaces outside the pod (an interface without a sandbox). An
    address that names no interface is the pod's.
    """
    interfaces = _objects(result, "interfaces")
    found = []
    for number, ip in enumerate(_objects(result, "ips")):
        name = ifname
        index = ip.get("interface")
        if isinstance(index, int) and 0 <= index < len(interfaces):
            if not interfaces[index].get("sandbox"):
                continue
            name = str(interfaces[index].get("name") or ifname)
        found.append(PodAddress(_bare_address(ip.get("address"), number), name))
    return found


def _bare_address(text: object, number: int) -> str:
    import ipaddress  # noqa: PLC0415 - 1.2 ms, for pods that get accelerated only

    try:
        if not isinstance(text, str):
            raise ValueError("it is not a string")
        return str(ipaddress.ip_interface(text).ip)
    except ValueError as error:
        raise InvalidConfig(
            f"prevResult.ips[{number}].address is no address in CIDR notation",
            f"address: {text!r:.80}: {error}",
        ) from error
