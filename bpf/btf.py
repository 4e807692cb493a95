# SPDX-License-Identifier: Apache-2.0
"""Where struct members lie in the running kernel, read from its BTF through libbpf.

The format is Documentation/bpf/btf.rst; only structs, unions, enums and what may stand between
them and their name (typedefs, qualifiers) are followed.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from dataclasses import dataclass

KIND_STRUCT, KIND_UNION, KIND_ENUM = 4, 5, 6
KIND_TYPEDEF, KIND_VOLATILE, KIND_CONST, KIND_RESTRICT, KIND_FUNC = 8, 9, 10, 11, 12
_TRANSPARENT = (KIND_TYPEDEF, KIND_VOLATILE, KIND_CONST, KIND_RESTRICT)


class BTFError(Exception):
    """The kernel has no BTF, or a struct or member that the programs need is not in it."""


class _Type(ctypes.Structure):
    _fields_ = [
        ("name_off", ctypes.c_uint32),
        ("info", ctypes.c_uint32),
        ("size_or_type", ctypes.c_uint32),
    ]


class _Member(ctypes.Structure):
    _fields_ = [
        ("name_off", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
    ]


class _Enumerator(ctypes.Structure):
    _fields_ = [("name_off", ctypes.c_uint32), ("value", ctypes.c_int32)]


@dataclass(frozen=True)
class Member:
    """A struct member's place: bytes from the start of the struct, and, for a bit-field, the mask
    of its bits in that byte (0xff otherwise)."""

    offset: int
    mask: int

    @property
    def lowest_bit(self) -> int:
        return self.mask & -self.mask


class KernelBTF:
    """The types of the running kernel."""

    def __init__(self) -> None:
        name = ctypes.util.find_library("bpf") or "libbpf.so.1"
        try:
            self._lib = ctypes.CDLL(name, use_errno=True)
        except OSError as error:
            raise BTFError(f"cannot load libbpf: {error}; install libbpf1") from error
        self._lib.btf__load_vmlinux_btf.restype = ctypes.c_void_p
        self._lib.btf__type_by_id.restype = ctypes.c_void_p
        self._lib.btf__type_by_id.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self._lib.btf__name_by_offset.restype = ctypes.c_char_p
        self._lib.btf__name_by_offset.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self._lib.btf__find_by_name_kind.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_uint32,
        ]
        self._lib.libbpf_get_error.restype = ctypes.c_long
        self._lib.libbpf_get_error.argtypes = [ctypes.c_void_p]
        self._btf = self._lib.btf__load_vmlinux_btf()
        if not self._btf or self._lib.libbpf_get_error(self._btf):
            raise BTFError(
                "this kernel has no BTF (/sys/kernel/btf/vmlinux); CONFIG_DEBUG_INFO_BTF"
            )

    def member(self, struct: str, path: str) -> Member:
        """The place of a member such as ``sk_backlog.rmem_alloc``; looks into anonymous members."""
        type_id = self.struct(struct)
        bits, mask = 0, 0xFF
        for name in path.split("."):
            found = self._member(type_id, name)
            if found is None:
                raise BTFError(f"struct {struct} of this kernel has no member {path}")
            offset, width, type_id = found
            bits += offset
            mask = ((1 << width) - 1) << (bits % 8) if 0 < width < 8 else 0xFF
        return Member(bits // 8, mask)

    def has_member(self, struct: str, path: str) -> bool:
        """Whether this kernel's struct has such a member, see member()."""
        try:
            self.member(struct, path)
        except BTFError:
            return False
        return True

    def has_struct(self, name: str) -> bool:
        """Whether this kernel has a struct of this name."""
        return self._id(name, KIND_STRUCT) > 0

    def struct(self, name: str) -> int:
        """The BTF ID of a struct."""
        return self._find(name, KIND_STRUCT)

    def size_of_union(self, name: str) -> int:
        """In bytes."""
        return int(_Type.from_address(self._address(self._find(name, KIND_UNION))).size_or_type)

    def function(self, name: str) -> int | None:
        """The BTF ID of a kernel function, None if this kernel has none of this name."""
        found = self._id(name, KIND_FUNC)
        return found if found > 0 else None

    def enumerator(self, enum: str, name: str) -> int:
        """The value of one enumerator."""
        address = self._address(self._find(enum, KIND_ENUM))
        header = _Type.from_address(address)
        entries = (_Enumerator * (header.info & 0xFFFF)).from_address(
            address + ctypes.sizeof(_Type)
        )
        for entry in entries:
            if self._name(entry.name_off) == name:
                return int(entry.value)
        raise BTFError(f"enum {enum} of this kernel has no {name}")

    def _find(self, name: str, kind: int) -> int:
        type_id = self._id(name, kind)
        if type_id < 0:
            raise BTFError(f"this kernel's BTF has no type {name}")
        return type_id

    def _id(self, name: str, kind: int) -> int:
        found: int = self._lib.btf__find_by_name_kind(self._btf, name.encode(), kind)
        return found

    def _address(self, type_id: int) -> int:
        address: int | None = self._lib.btf__type_by_id(self._btf, type_id)
        if not address:
            raise BTFError(f"this kernel's BTF has no type {type_id}")
        return address

    def _name(self, offset: int) -> str:
        name: bytes = self._lib.btf__name_by_offset(self._btf, offset)
        return name.decode()

    def _members(self, type_id: int) -> Iterator[tuple[str, int, int, int]]:
        """(name, bit offset, bit width or 0, type) of every member, anonymous ones as ''."""
        address = self._address(type_id)
        info = _Type.from_address(address).info
        members = (_Member * (info & 0xFFFF)).from_address(address + ctypes.sizeof(_Type))
        for member in members:
            has_widths = info >> 31
            offset = member.offset & 0xFFFFFF if has_widths else member.offset
            width = member.offset >> 24 if has_widths else 0
            yield self._name(member.name_off), offset, width, member.type

    def _member(self, type_id: int, wanted: str) -> tuple[int, int, int] | None:
        kind = (_Type.from_address(self._address(type_id)).info >> 24) & 0x1F
        while kind in _TRANSPARENT:
            type_id = _Type.from_address(self._address(type_id)).size_or_type
            kind = (_Type.from_address(self._address(type_id)).info >> 24) & 0x1F
        if kind not in (KIND_STRUCT, KIND_UNION):
            return None
        for name, offset, width, member_type in self._members(type_id):
            if name == wanted:
                return offset, width, member_type
            if not name:
                inner = self._member(member_type, wanted)
                if inner is not None:
                    return offset + inner[0], inner[1], inner[2]
        return None
