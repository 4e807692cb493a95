# SPDX-License-Identifier: Apache-2.0
"""Which pod is accelerated, and how: the operator's configuration and the pod's annotations.

No function here fails a pod. An annotation that cannot be understood leaves the pod on plain TCP,
with a message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cni_plugin import names

if TYPE_CHECKING:
    from cni_plugin.netconf import NetConf
    from cni_plugin.protocol import Json, Request

MAX_PORT = 65535


class Pod(NamedTuple):
    """The pod's names, for messages, and what its owner wrote on it."""

    namespace: str
    name: str
    uid: str
    annotations: dict[str, str]

    @property
    def in_mesh(self) -> bool:
        """Injected pods carry this mark, those with a native sidecar too."""
        return names.SIDECAR_STATUS in self.annotations


class Plan(NamedTuple):
    """An accelerated pod: ports are inclusive ranges, sorted and apart from each other."""

    proxy_only: bool
    excluded_ports: tuple[tuple[int, int], ...]
    proxy_uid: int  # the sidecar's user, as the pod counts


class Decision(NamedTuple):
    """``plan`` is None for a pod that stays on TCP, for this ``reason``."""

    plan: Plan | None
    reason: str


def pod_of(request: Request) -> Pod:
    """The pod as the runtime describes it; parts of the wrong type count as absent."""
    runtime = request.conf.get("runtimeConfig")
    annotations = runtime.get(names.POD_ANNOTATIONS) if isinstance(runtime, dict) else None
    if not isinstance(annotations, dict):
        annotations = {}
    args = request.call.args
    return Pod(
        namespace=args.get("K8S_POD_NAMESPACE", ""),
        name=args.get("K8S_POD_NAME", ""),
        uid=args.get("K8S_POD_UID", ""),
        annotations={k: v for k, v in annotations.items() if isinstance(v, str)},
    )


def cgroup_path_of(request: Request) -> object:
    """``runtimeConfig.cgroupPath`` as it came, or None."""
    runtime = request.conf.get("runtimeConfig")
    return runtime.get(names.CGROUP_PATH) if isinstance(runtime, dict) else None


def may_concern_us(conf: Json, pod: Pod) -> bool:
    """False for a pod that does not concern us, with any other key of the configuration.

    Such a pod is answered before the configuration is validated: neither an operator's mistake
    nor jsonschema's 60 ms shall reach it.
    """
    scope = conf.get("scope", "mesh")
    if names.ENABLED in pod.annotations:
        return True
    return scope != "annotated" and (pod.in_mesh or scope != "mesh")


def decide(conf: NetConf, pod: Pod, mode: tuple[str, str]) -> Decision:
    """``mode`` is full, proxy-only or off, and why it is."""
    try:
        enabled = _boolean(pod, names.ENABLED)
        proxy_only = _boolean(pod, names.PROXY_ONLY) or mode[0] == "proxy-only"
        ports = _excluded_ports(pod)
        proxy_uid = _proxy_uid(pod, conf)
    except ValueError as error:
        return Decision(None, f"warning: bad annotation: {error}")
    against = _against(conf, pod, mode, enabled)
    if proxy_only and not (pod.in_mesh or enabled):  # a gateway has no mark, and asks
        against.append("only sidecars are to be accelerated, and the pod has none")
    if against:
        return Decision(None, "; ".join(against))
    plan = Plan(proxy_only, merge_ports([*conf.exclude_ports, *ports]), proxy_uid)
    return Decision(plan, "")


def _against(conf: NetConf, pod: Pod, mode: tuple[str, str], enabled: bool | None) -> list[str]:
    """Every reason to leave the pod alone. The operator's come before the pod owner's wish."""
    found = []
    if mode[0] == "off":
        found.append(f"the bypass is off on this node: {mode[1]}")
    if conf.include_namespaces and pod.namespace not in conf.include_namespaces:
        found.append(f"namespace {pod.namespace} is not included")
    if pod.namespace in conf.exclude_namespaces:
        found.append(f"namespace {pod.namespace} is excluded")
    if enabled is False:
        found.append(f"annotation {names.ENABLED} is false")
    if conf.scope == "annotated":
        if enabled is None:
            found.append(f"the pod does not ask for it by annotation {names.ENABLED}")
    elif not (pod.in_mesh or enabled or conf.scope == "all"):
        found.append("the pod is not in the mesh")
    return found


def _boolean(pod: Pod, annotation: str) -> bool | None:
    text = pod.annotations.get(annotation)
    if text is None:
        return None
    value = {"true": True, "false": False}.get(text.strip().lower())
    if value is None:
        raise ValueError(f'{annotation} is {text!r:.80}, neither "true" nor "false"')
    return value


def _proxy_uid(pod: Pod, conf: NetConf) -> int:
    """The operator says which users a pod may name: RULE (lock) trusts sidecars."""
    text = pod.annotations.get(names.PROXY_UID_OF_POD)
    if text is None:
        return conf.proxy_uid
    if not _is_number(text, digits=10):
        raise ValueError(f"{names.PROXY_UID_OF_POD} is {text!r:.80}, no user ID")
    allowed = (*conf.proxy_uids, (conf.proxy_uid, conf.proxy_uid))
    if not any(first <= int(text) <= last for first, last in allowed):
        raise ValueError(f"{names.PROXY_UID_OF_POD} is {text}, which proxyUIDs does not allow")
    return int(text)


def _excluded_ports(pod: Pod) -> list[tuple[int, int]]:
    try:
        return parse_ports(pod.annotations.get(names.EXCLUDE_PORTS, ""))
    except ValueError as error:
        raise ValueError(f"{names.EXCLUDE_PORTS} has {error}") from error


def parse_ports(text: str) -> list[tuple[int, int]]:
    """``"3306,8000-8100"`` as ranges; raises ValueError that names the part that is none."""
    ranges = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dash, last = (each.strip() for each in part.partition("-"))
        if not dash:
            last = first
        if not (_is_number(first) and _is_number(last)):
            raise ValueError(f"{part!r:.80}, no port and no range")
        if not 1 <= int(first) <= int(last) <= MAX_PORT:
            raise ValueError(f"{part!r:.80}, not within 1 to {MAX_PORT}")
        ranges.append((int(first), int(last)))
    return ranges


def _is_number(text: str, digits: int = 5) -> bool:
    # int() takes more than digits, and thousands of digits take it long.
    return text.isascii() and text.isdigit() and len(text) <= digits


def merge_ports(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted, with ranges that overlap or touch made one: the kernel's record is short."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)
