# SPDX-License-Identifier: Apache-2.0
"""bpf(2): pins, maps, cgroup attachments, iterators.

Raw system calls through libc's syscall(2). libbpf would do, but it is a shared library of the
build machine's age that every node then had to be young enough for.

Every function raises OSError with the kernel's errno. File descriptors belong to the caller.
Numbers and layouts: include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_SYSCALL_NUMBER = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}

_MAP_LOOKUP_ELEM = 1
_MAP_UPDATE_ELEM = 2
_MAP_DELETE_ELEM = 3
_MAP_GET_NEXT_KEY = 4
_PROG_LOAD = 5
_OBJ_PIN = 6
_OBJ_GET = 7
_PROG_ATTACH = 8
_PROG_DETACH = 9
_PROG_RUN = 10
_PROG_GET_FD_BY_ID = 13
_MAP_GET_FD_BY_ID = 14
_OBJ_GET_INFO_BY_FD = 15
_PROG_QUERY = 16
_LINK_CREATE = 28
_ITER_CREATE = 33

_TRACE_ITER = 28  # BPF_TRACE_ITER of enum bpf_attach_type
CGROUP_SOCK_OPS = 3  # BPF_CGROUP_SOCK_OPS of enum bpf_attach_type
CGROUP_SETSOCKOPT = 22  # BPF_CGROUP_SETSOCKOPT
PROG_TYPE_CGROUP_SOCKOPT = 25
_PROG_TYPE_TRACING = 26
MAP_TYPE_CGROUP_STORAGE = 19
_F_ALLOW_MULTI = 2
_ATTR_SIZE = 256  # bytes; the kernel has 168 (Linux 6.18), and takes zeros behind those
_MAX_CGROUP_PROGS = 64  # BPF_CGROUP_MAX_PROGS of kernel/bpf/cgroup.c
_MAX_KEY = 512  # MAX_BPF_STACK, which no hash key passes
_MAX_PROG_MAPS = 64  # MAX_USED_MAPS of include/linux/bpf_verifier.h

# struct bpf_prog_info up to ``name``, struct bpf_map_info up to ``name``.
_PROG_INFO = struct.Struct("=II8sIIQQQIIQ16s")
_MAP_INFO = struct.Struct("=IIIIII16s")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class Program(NamedTuple):
    id: int
    name: str
    map_ids: tuple[int, ...]


class Map(NamedTuple):
    id: int
    type: int
    name: str
    key_size: int
    value_size: int


def _bpf(command: int, attr: ctypes.Array[ctypes.c_char]) -> int:
    number = _SYSCALL_NUMBER[os.uname().machine]
    result = int(
        _libc.syscall(ctypes.c_long(number), ctypes.c_int(command), attr, ctypes.c_uint(len(attr)))
    )
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _attr(layout: str, *values: int | bytes) -> ctypes.Array[ctypes.c_char]:
    """A union bpf_attr, zeros behind these values. RULE: never shorter than the kernel's own, which
    writes into it whatever size it was told: Linux 6.17 and 6.18.15 do, 24 bytes past what
    BPF_PROG_QUERY was given before (query.revision, __cgroup_bpf_query)."""
    return ctypes.create_string_buffer(struct.pack(layout, *values), _ATTR_SIZE)


def _address(buffer: ctypes.Array[ctypes.c_char] | ctypes.Structure) -> int:
    return ctypes.addressof(buffer)


def _path_call(command: int, path: str, fd: int) -> int:
    text = ctypes.create_string_buffer(os.fsencode(path))
    try:
        return _bpf(command, _attr("=QII", _address(text), fd, 0))
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def obj_get(path: str) -> int:
    """Open what is pinned at ``path``."""
    return _path_call(_OBJ_GET, path, 0)


def obj_pin(fd: int, path: str) -> None:
    """Pin program or map ``fd`` at ``path``, which must be free and on bpffs."""
    _path_call(_OBJ_PIN, path, fd)


@contextmanager
def closing(fd: int) -> Iterator[int]:
    """``with closing(obj_get(path)) as fd``."""
    try:
        yield fd
    finally:
        os.close(fd)


def map_lookup(map_fd: int, key: bytes, value_size: int) -> bytes:
    """The value under ``key``; ENOENT when there is none. Not for per-CPU maps."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    value = ctypes.create_string_buffer(value_size)
    _bpf(_MAP_LOOKUP_ELEM, _attr("=IIQQQ", map_fd, 0, _address(key_buffer), _address(value), 0))
    return value.raw


def map_update(map_fd: int, key: bytes, value: bytes) -> None:
    """Put ``value`` under ``key``, whether or not there is one. Not for per-CPU maps."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    data = ctypes.create_string_buffer(value, len(value))
    _bpf(_MAP_UPDATE_ELEM, _attr("=IIQQQ", map_fd, 0, _address(key_buffer), _address(data), 0))


def map_delete(map_fd: int, key: bytes) -> None:
    """Remove ``key``; ENOENT when it is not there."""
    key_buffer = ctypes.create_string_buffer(key, len(key))
    _bpf(_MAP_DELETE_ELEM, _attr("=IIQQQ", map_fd, 0, _address(key_buffer), 0, 0))


def map_keys(map_fd: int, key_size: int) -> Iterator[bytes]:
    """Every key; while the map changes, some may be missed or come twice."""
    key: ctypes.Array[ctypes.c_char] | None = None
    while True:
        following = ctypes.create_string_buffer(key_size)
        here = 0 if key is None else _address(key)
        try:
            _bpf(_MAP_GET_NEXT_KEY, _attr("=IIQQQ", map_fd, 0, here, _address(following), 0))
        except FileNotFoundError:
            return
        yield following.raw
        key = following


def map_is_empty(map_fd: int) -> bool:
    """Whether the map has no key at all."""
    return next(map_keys(map_fd, _MAX_KEY), None) is None


def prog_attach(prog_fd: int, cgroup_fd: int) -> None:
    """Attach to a cgroup next to what others have attached; EINVAL when it already is."""
    _bpf(_PROG_ATTACH, _attr("=IIIII", cgroup_fd, prog_fd, CGROUP_SOCK_OPS, _F_ALLOW_MULTI, 0))


def prog_detach(prog_fd: int, cgroup_fd: int) -> None:
    """ENOENT when it is not attached to this very cgroup."""
    _bpf(_PROG_DETACH, _attr("=IIIII", cgroup_fd, prog_fd, CGROUP_SOCK_OPS, 0, 0))


def link_setsockopt(prog_fd: int, cgroup_fd: int) -> int:
    """Attach to setsockopt(2) of a cgroup, next to others, for as long as the link is open."""
    return _bpf(_LINK_CREATE, _attr("=IIII", prog_fd, cgroup_fd, CGROUP_SETSOCKOPT, 0))


def prog_query(cgroup_fd: int) -> list[int]:
    """IDs of the sock_ops programs attached to this very cgroup (not to its ancestors)."""
    ids = (ctypes.c_uint32 * _MAX_CGROUP_PROGS)()
    attr = _attr(
        "=IIIIQII",
        cgroup_fd,
        CGROUP_SOCK_OPS,
        0,
        0,
        ctypes.addressof(ids),
        _MAX_CGROUP_PROGS,
        0,
    )
    _bpf(_PROG_QUERY, attr)
    (count,) = struct.unpack_from("=I", attr.raw, 24)
    return list(ids[:count])


def visit_files(prog_fd: int, pid: int) -> bytes:
    """Run an iterator program (bpf_iter/task_file) over the open files of one process; returns what
    it has written.

    ``pid`` is of the caller's PID namespace; ESRCH (ProcessLookupError) when there is no such
    process. Before Linux 6.1 an iterator cannot be limited to a process: E2BIG or EINVAL.
    """
    # union bpf_iter_link_info, its member task: tid, pid, pid_fd
    of_process = ctypes.create_string_buffer(struct.pack("=III", 0, pid, 0), 12)
    attr = _attr("=IIIIQI", prog_fd, 0, _TRACE_ITER, 0, _address(of_process), 12)
    with (
        closing(_bpf(_LINK_CREATE, attr)) as link,
        closing(_bpf(_ITER_CREATE, _attr("=II", link, 0))) as iterator,
    ):
        # Any word ends a read: what the process has closed meanwhile is released then.
        return b"".join(iter(lambda: os.read(iterator, 4), b""))


def iterator_load(instructions: bytes, function: int) -> int:
    """Load an iterator program; EACCES when the verifier refuses it.

    ``instructions`` are of struct bpf_insn; ``function`` is the BTF ID of the kernel's function
    that stands for what is iterated over.
    """
    license_ = ctypes.create_string_buffer(b"GPL")
    code = ctypes.create_string_buffer(instructions, len(instructions))
    attr = _attr(
        "=IIQQIIQII16sIIIIQIIQII",
        *(_PROG_TYPE_TRACING, len(instructions) // 8, _address(code), _address(license_)),
        *(0, 0, 0, 0, 0, b"", 0, _TRACE_ITER, 0, 0, 0, 0, 0, 0, 0, function),
    )
    return _bpf(_PROG_LOAD, attr)


def prog_run(prog_fd: int, packet: bytes, ifindex: int = 0) -> int:
    """Run a program for packets on this one, in the caller's network namespace; returns what the
    program does. Nothing is sent.

    ``ifindex`` is the device that it seems to come by; 0: the loopback device.
    """
    data = ctypes.create_string_buffer(packet, len(packet))
    # struct __sk_buff up to its member ifindex
    context = ctypes.create_string_buffer(bytes(40) + ifindex.to_bytes(4, sys.byteorder), 44)
    attr = _attr(
        "=IIIIQQIIIIQ",
        *(prog_fd, 0, len(packet), 0, _address(data), 0, 1, 0),
        *(len(context), 0, _address(context)),
    )
    _bpf(_PROG_RUN, attr)
    (found,) = struct.unpack_from("=I", attr.raw, 4)
    return int(found)


def prog_open(prog_id: int) -> int:
    """ENOENT when no program has this ID any more."""
    return _bpf(_PROG_GET_FD_BY_ID, _attr("=III", prog_id, 0, 0))


def map_open(map_id: int) -> int:
    """ENOENT when no map has this ID any more."""
    return _bpf(_MAP_GET_FD_BY_ID, _attr("=III", map_id, 0, 0))


def _info(fd: int, info: ctypes.Array[ctypes.c_char]) -> None:
    _bpf(_OBJ_GET_INFO_BY_FD, _attr("=IIQ", fd, len(info), _address(info)))


def prog_info(prog_fd: int) -> Program:
    ids = (ctypes.c_uint32 * _MAX_PROG_MAPS)()
    info = ctypes.create_string_buffer(
        _PROG_INFO.pack(0, 0, b"", 0, 0, 0, 0, 0, 0, len(ids), ctypes.addressof(ids), b""),
        _PROG_INFO.size,
    )
    _info(prog_fd, info)
    _, prog_id, _, _, _, _, _, _, _, map_count, _, name = _PROG_INFO.unpack(info.raw)
    return Program(prog_id, _text(name), tuple(ids[:map_count]))


def map_info(map_fd: int) -> Map:
    info = ctypes.create_string_buffer(_MAP_INFO.size)
    _info(map_fd, info)
    kind, map_id, key_size, value_size, _, _, name = _MAP_INFO.unpack(info.raw)
    return Map(map_id, kind, _text(name), key_size, value_size)


def _text(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode("ascii", "replace")
