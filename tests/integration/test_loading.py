# SPDX-License-Identifier: Apache-2.0
"""The programs read kernel memory by a kernel function, or by a helper where there is none."""

from __future__ import annotations

import ctypes
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from bpf import bpfsys, loader
from bpf.btf import KernelBTF
from bpf.loader import Instructions, KernelFunction
from cni_plugin import attachment
from tests.bed import PROXY_UID, cgroups
from tests.integration import traffic_pods
from tests.integration.traffic_pods import FIRST_BYTES, bypassed, connected, eventually, exchange
from tests.light import LIMITS, LightPod

A, B = "10.244.0.11", "10.244.0.12"
NO_FUNCTION = 1  # a BTF ID: the kernel's first type is a plain one


def refused() -> KernelFunction | None:
    """The kernel function, with an ID that cannot be called; None where there is no function."""
    function = loader.rdonly_cast(KernelBTF())
    return function and replace(function, btf_id=NO_FUNCTION)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("is_there", [False, True])
def test_the_helper_does_as_well(monkeypatch: pytest.MonkeyPatch, *, is_there: bool) -> None:
    """As on 6.1, which has no such function; and where the kernel refuses to have it called."""
    function = refused() if is_there else None
    monkeypatch.setattr(loader, "rdonly_cast", lambda _: function)
    with traffic_pods.node() as node, node.pod(A) as client, node.pod(B) as server:
        with connected(client, server, server_uid=PROXY_UID) as (ours, theirs):
            sent = exchange(ours, theirs)
        assert eventually(lambda: bypassed(client, server) == sent - FIRST_BYTES)


def test_a_refused_function_leaves_no_map_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_files()
    programs = loader.Programs(LIMITS)
    once = open_files() - before
    function = refused()
    monkeypatch.setattr(loader, "rdonly_cast", lambda _: function)
    again = loader.Programs(LIMITS)
    assert open_files() - before == 2 * once
    for each in (programs, again):
        each.close()
    assert open_files() == before


def test_a_cgroup_that_goes_before_it_is_detached(tmp_path: Path) -> None:
    """As a pod may end while `unload` is at it."""
    folder = cgroups.mount_point() / f"tb-gone-{tmp_path.name}-{os.getpid()}"
    folder.mkdir()
    inode = folder.stat().st_ino
    with closing(loader.Programs(LIMITS)) as programs:
        LightPod(folder, programs)
        with bpfsys.closing(os.open(folder, os.O_RDONLY | os.O_DIRECTORY)) as fd:
            with attachment.attached(fd, inode) as found:
                folder.rmdir()
                [ours] = found
                attachment.detach(ours, fd, inode)
            with attachment.attached(fd, inode) as found:
                assert not found


def test_only_the_placeholder_is_linked() -> None:
    call, placeholder = 0x0085, KernelFunction.PLACEHOLDER << 32
    code: Instructions = (ctypes.c_uint64 * 3)(placeholder | call, 4 << 32 | call, placeholder)
    KernelFunction(77, []).link(code)
    assert list(code) == [77 << 32 | 0x2085, 4 << 32 | call, placeholder]


def test_a_bpf_attr_is_no_shorter_than_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux 6.17 writes behind a shorter one: what followed it on the heap was lost."""
    union = KernelBTF().size_of_union("bpf_attr")
    sizes = set()

    def syscall(
        _number: object, _command: object, attr: ctypes.Array[ctypes.c_char], *_: object
    ) -> int:
        sizes.add(ctypes.sizeof(attr))
        return 0

    monkeypatch.setattr(bpfsys, "_libc", SimpleNamespace(syscall=syscall))
    bpfsys.prog_query(3)
    bpfsys.obj_get("/sys/fs/bpf/x")
    bpfsys.map_lookup(3, bytes(4), 8)
    assert min(sizes) >= union
