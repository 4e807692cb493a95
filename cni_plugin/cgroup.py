# SPDX-License-Identifier: Apache-2.0
"""Where a pod's cgroup is below the cgroup2 mount.

Two naming schemes: the kubelet's cgroupfs driver (``/kubepods/burstable/pod<uid>``) and its
systemd driver (``/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice``
with each ``-`` of the UID as ``_``).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOUNTINFO = Path("/proc/self/mountinfo")
USUAL_PLACES = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))

_OCTAL = re.compile(r"\\([0-7]{3})")
_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# How deep below the mount a pod may be. The kubelet's own depth is 3; its --cgroup-root and
# nested nodes (kind, k3d) add some.
_MAX_DEPTH = 8


def find_mount() -> Path | None:
    """The cgroup2 mount that shows the most of the hierarchy; None if there is none.

    The root of the hierarchy shows all of it, and alone has no ``cgroup.type`` (cgroup-v2, "Core
    Interface Files"). Where it is in its usual place, mountinfo need not be read: with a thousand
    pods on the node the kernel takes milliseconds to write it.

    :raises OSError: when /proc is not there
    """
    for place in USUAL_PLACES:
        if (place / "cgroup.controllers").exists() and not (place / "cgroup.type").exists():
            return place
    return mount_point(mountinfo())


def mountinfo() -> str:
    """The text of /proc/self/mountinfo; raises OSError when /proc is not there."""
    return _MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape")


def mount_point(text: str) -> Path | None:
    """The cgroup2 mount in ``text``, which is mountinfo(); proc(5) has the format.

    Of several, the one that shows the most of the hierarchy.
    """
    best: tuple[str, str] | None = None
    for line in text.split("\n"):  # a name may hold whatever else ends a line
        before, separator, after = line.partition(" - ")
        fields = before.split(" ")
        if separator and after.split(" ", 1)[0] == "cgroup2" and len(fields) > 4:
            found = (fields[3], fields[4])
            if best is None or len(found[0]) < len(best[0]):
                best = found
    return Path(unescaped(best[1])) if best else None


def unescaped(text: str) -> str:
    """Of mountinfo, where space, tab, newline and backslash stand as three octal digits."""
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), text)


def find(cgroup_path: object, pod_uid: str) -> tuple[Path | None, str]:
    """The pod's cgroup folder, or None and the reason in an operator's words.

    :param cgroup_path: ``runtimeConfig.cgroupPath`` as it came, possibly absent
    :param pod_uid: ``K8S_POD_UID``, possibly empty
    :raises OSError: when /proc is not there
    """
    root = find_mount()
    if root is None:
        return None, "no cgroup2 file system is mounted"
    if isinstance(cgroup_path, str) and cgroup_path:
        for relative in relative_paths(cgroup_path):
            if is_of_pod(root / relative, pod_uid) and (root / relative).is_dir():
                return root / relative, ""
    if _UID.fullmatch(pod_uid):
        found = search(root, pod_uid)
        if found is not None:
            return found, ""
    return None, (
        f"no cgroup of the pod below {root} "
        f"(runtimeConfig.cgroupPath {cgroup_path!r:.200}, K8S_POD_UID {pod_uid!r:.80})"
    )


def relative_paths(cgroup_path: str) -> list[str]:
    """Where ``cgroupPath`` may lead below the mount; empty when it leads out of it.

    A runtime with systemd's driver may hand over ``slice:prefix:container`` or the bare name of
    the slice. The container's scope does not exist yet at ADD: the slice is the pod.
    """
    parts = [part for part in cgroup_path.split(":", 1)[0].split("/") if part]
    if not parts or not cgroup_path.isprintable() or not {".", ".."}.isdisjoint(parts):
        return []
    candidates = ["/".join(parts)]
    if parts[-1].endswith(".slice"):
        candidates.append(expand_slice(parts[-1]))
    return candidates


def is_of_pod(folder: Path, pod_uid: str) -> bool:
    """Whether the folder's name holds the pod's UID, in either driver's spelling.

    A cgroup that pods share (a runtime used without a kubelet may make such) must not get one
    pod's record. Without a UID it finds none.
    """
    found = pod_uid in folder.name or pod_uid.replace("-", "_") in folder.name
    return found and bool(pod_uid)


def expand_slice(name: str) -> str:
    """``a-b.slice`` is ``a.slice/a-b.slice``: systemd.slice(5)."""
    parts = name[: -len(".slice")].split("-")
    return "/".join(f"{'-'.join(parts[:count])}.slice" for count in range(1, len(parts) + 1))


def search(mount: Path, pod_uid: str) -> Path | None:
    """The folder of the pod with this UID, breadth first, without looking into other pods."""
    ending = f"pod{pod_uid}"
    wanted = {ending, f"{ending.replace('-', '_')}.slice"}
    level = [mount]
    for _ in range(_MAX_DEPTH):
        below: list[Path] = []
        for folder in level:
            for name in _folders(folder):
                if name in wanted or name.rsplit("-", 1)[-1] in wanted:
                    return folder / name
                if not _is_pod(name):
                    below.append(folder / name)
        level = below
    return None


def _folders(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []  # another pod's cgroup, gone since we saw its name


def _is_pod(name: str) -> bool:
    # "kubepods" is no pod; "pod<uid>" and "kubepods-burstable-pod<uid>.slice" are.
    return name.startswith("pod") or "-pod" in name
