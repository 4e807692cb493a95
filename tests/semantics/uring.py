# SPDX-License-Identifier: Apache-2.0
"""Just enough io_uring to receive, send and poll, through the raw system calls.

Numbers and layouts: include/uapi/linux/io_uring.h. Little-endian machines with strong or weak
memory order alike: one thread, and a system call between every store and load that matter.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import struct
from types import TracebackType

_SETUP, _ENTER = 425, 426
_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000
_FEAT_SINGLE_MMAP = 1
_OP_POLL_ADD, _OP_SEND, _OP_RECV = 6, 26, 27
_IOSQE_ASYNC = 1 << 4
_SQE_SIZE, _CQE_SIZE, _ENTRIES = 64, 16, 4

_libc = ctypes.CDLL(None, use_errno=True)


class RingUnavailable(Exception):
    """This kernel has no io_uring, or it is switched off."""


class Ring:
    """One ring; a request at a time, its result by `completion`."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(120)
        self._fd = _libc.syscall(_SETUP, _ENTRIES, parameters)
        if self._fd < 0:
            raise RingUnavailable(f"io_uring_setup: {errno.errorcode[ctypes.get_errno()]}")
        sq_entries, cq_entries, _, _, _, features = struct.unpack_from("6I", parameters.raw)
        if not features & _FEAT_SINGLE_MMAP:
            raise RingUnavailable("io_uring older than 5.4")
        # struct io_sqring_offsets at 40, io_cqring_offsets at 80
        _, self._sq_tail, self._sq_mask, _, _, _, self._sq_array = struct.unpack_from(
            "7I", parameters.raw, 40
        )
        self._cq_head, self._cq_tail, self._cq_mask, _, _, self._cqes = struct.unpack_from(
            "6I", parameters.raw, 80
        )
        size = max(self._sq_array + 4 * sq_entries, self._cqes + _CQE_SIZE * cq_entries)
        self._ring = mmap.mmap(self._fd, size, offset=_OFF_SQ_RING)
        self._sqes = mmap.mmap(self._fd, _SQE_SIZE * sq_entries, offset=_OFF_SQES)
        self._buffers: list[ctypes.Array[ctypes.c_char]] = []

    def __enter__(self) -> Ring:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ring.close()
        self._sqes.close()
        os.close(self._fd)

    def recv(
        self, fd: int, size: int, flags: int = 0, by_worker: bool = False
    ) -> ctypes.Array[ctypes.c_char]:
        """Asks for bytes; the buffer returned holds them once it is completed.

        With `by_worker` a thread of the kernel makes the call at once (IOSQE_ASYNC).
        """
        buffer = ctypes.create_string_buffer(size)
        self._submit(_OP_RECV, fd, buffer, size, flags, how=_IOSQE_ASYNC * by_worker)
        return buffer

    def send(self, fd: int, data: bytes, flags: int = 0, by_worker: bool = False) -> None:
        """Sends; `by_worker` as in recv()."""
        buffer = ctypes.create_string_buffer(data, len(data))
        self._submit(_OP_SEND, fd, buffer, len(data), flags, how=_IOSQE_ASYNC * by_worker)

    def poll(self, fd: int, mask: int) -> None:
        """Asks to be told of one of the events."""
        self._submit(_OP_POLL_ADD, fd, None, 0, mask)

    def _word(self, offset: int) -> int:
        return int(struct.unpack_from("I", self._ring, offset)[0])

    def _submit(
        self,
        op: int,
        fd: int,
        buffer: ctypes.Array[ctypes.c_char] | None,
        size: int,
        flags: int,
        *,
        how: int = 0,
    ) -> None:
        if buffer is not None:
            self._buffers.append(buffer)  # the kernel writes there: it must outlive the request
        tail = self._word(self._sq_tail)
        index = tail & self._word(self._sq_mask)
        address = ctypes.addressof(buffer) if buffer is not None else 0
        entry = struct.pack("BBHiQQIIQ", op, how, 0, fd, 0, address, size, flags, 0)
        self._sqes[index * _SQE_SIZE : (index + 1) * _SQE_SIZE] = entry.ljust(_SQE_SIZE, b"\0")
        struct.pack_into("I", self._ring, self._sq_array + 4 * index, index)
        struct.pack_into("I", self._ring, self._sq_tail, tail + 1)
        if _libc.syscall(_ENTER, self._fd, 1, 0, 0, None, 0) != 1:
            raise OSError(ctypes.get_errno(), "io_uring_enter")

    def completion(self, timeout_s: float) -> int | None:
        """The result of the oldest request that is done: a count, a mask or -errno."""
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        if not poller.poll(timeout_s * 1000):
            return None
        head = self._word(self._cq_head)
        offset = self._cqes + _CQE_SIZE * (head & self._word(self._cq_mask))
        _, result, _ = struct.unpack_from("QiI", self._ring, offset)
        struct.pack_into("I", self._ring, self._cq_head, head + 1)
        return int(result)
