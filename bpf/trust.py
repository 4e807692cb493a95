# SPDX-License-Identifier: Apache-2.0
"""Whether this kernel lets a program go from an open file to its socket: bpf/data_path/lookup.h.

The verifier takes what was read through a pointer that it does not trust as trusted all the same
(check_ptr_to_btf_access() says "Old compat. Deprecated"). A kernel was met that does not.
"""

from __future__ import annotations

import errno
import os
import struct

from bpf import bpfsys
from bpf.btf import BTFError, KernelBTF

_SOCK_FROM_FILE, _SKC_TO_TCP_SOCK = 162, 137  # enum bpf_func_id
_LOAD, _CALL, _EXIT_IF_NULL, _SET, _EXIT = 0x79, 0x85, 0x15, 0xB7, 0x95


def _instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """struct bpf_insn, linux/bpf.h."""
    return struct.pack("=BBhi", code, source << 4 | to, offset, value)


def _program(btf: KernelBTF) -> bytes:
    """What tb_visit_file() begins with. The file stands fourth in the context."""
    return b"".join(
        [
            _instruction(_LOAD, to=1, source=1, offset=24),
            _instruction(_EXIT_IF_NULL, to=1, offset=5),
            _instruction(_CALL, value=_SOCK_FROM_FILE),
            _instruction(_EXIT_IF_NULL, to=0, offset=3),
            _instruction(_LOAD, to=1, source=0, offset=btf.member("socket", "sk").offset),
            _instruction(_EXIT_IF_NULL, to=1, offset=1),
            _instruction(_CALL, value=_SKC_TO_TCP_SOCK),
            _instruction(_SET, to=0, value=0),
            _instruction(_EXIT),
        ]
    )


def reaches_sockets(btf: KernelBTF) -> bool:
    """False only if the verifier refuses it. Raises BTFError before Linux 5.8."""
    function = btf.function("bpf_iter_task_file")
    if function is None:
        raise BTFError("this kernel has no iterator over open files")
    try:
        os.close(bpfsys.iterator_load(_program(btf), function))
    except OSError as error:
        return error.errno != errno.EACCES
    return True
