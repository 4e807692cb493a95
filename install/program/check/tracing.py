# SPDX-License-Identifier: Apache-2.0
"""Whether this kernel lets a tracing program in, tried with one that does nothing.

Kernel lockdown, a missing trampoline (arm64 before 6.4) or a missing capability refuse it. The
program names bpf_fentry_test1, which the kernel calls in its own tests only, and is never attached.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_PROG_TYPE_TRACING = 26  # linux/bpf.h, enum bpf_prog_type
_TRACE_FEXIT = 25  # linux/bpf.h, enum bpf_attach_type
_RETURN_0 = struct.pack("=BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)  # r0 = 0; exit


class _LoadOptions(ctypes.Structure):
    """struct bpf_prog_load_opts of libbpf 1.0, bpf.h, as far as it is needed here."""

    _fields_ = [
        ("sz", ctypes.c_size_t),
        ("attempts", ctypes.c_int),
        ("expected_attach_type", ctypes.c_int),
        ("prog_btf_fd", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_ifindex", ctypes.c_uint32),
        ("kern_version", ctypes.c_uint32),
        ("attach_btf_id", ctypes.c_uint32),
        ("attach_prog_fd", ctypes.c_uint32),
    ]


def why_not() -> str:
    """Empty when a fexit program loads; else what the kernel, or libbpf, said."""
    try:
        libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
        function = libbpf.libbpf_find_vmlinux_btf_id(b"bpf_fentry_test1", _TRACE_FEXIT)
        if function < 0:
            return f"no BTF of the kernel's functions: {os.strerror(-function)}"
        options = _LoadOptions(
            sz=ctypes.sizeof(_LoadOptions),
            expected_attach_type=_TRACE_FEXIT,
            attach_btf_id=function,
        )
        size = ctypes.c_size_t(len(_RETURN_0) // 8)
        program = libbpf.bpf_prog_load(
            _PROG_TYPE_TRACING, b"tb_try", b"GPL", _RETURN_0, size, ctypes.byref(options)
        )
    except (OSError, AttributeError) as error:
        return f"libbpf 1 cannot be used: {error}"
    if program < 0:
        # libbpf 1.0 to 1.4 may return -1 and set errno, later ones return -errno.
        number = ctypes.get_errno() or -program
        name = errno.errorcode.get(number, number)  # ENOTSUPP, 524, is the kernel's own
        return f"a fexit program does not load: {os.strerror(number)} ({name})"
    os.close(program)
    return ""
