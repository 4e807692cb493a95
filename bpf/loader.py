# SPDX-License-Identifier: Apache-2.0
"""Compiles the programs for the running kernel with bcc and pins them as a new generation.

Only the node program imports this: libbcc brings 220 MB of compiler with it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import os
import platform
import re
import resource
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from bpf import bpfsys, pins, preemption, trust
from bpf.btf import BTFError, KernelBTF, Member

_HERE = Path(__file__).parent
SOURCE = _HERE / "tcpip_bypass.c"
_INCLUDE = re.compile(r'^#include "(data_path/[^"]+)"$', re.MULTILINE)

# Names in the C file, and what they are pinned as.
VISIT = "tb_visit_file"
VISIT_SOCKET = "tb_visit_socket"  # where this kernel needs it
TAKE_IN = "tb_take_in"
REFUSE = "tb_refuse_splice"
MEND = "tb_mend"  # after each of these kernel functions; the links are pinned under these names
MENDED = dict(zip(pins.MENDS, ("inet_ioctl", "inet6_ioctl"), strict=True))
PROGRAM_PINS = {
    "tb_sock_ops": pins.SOCK_OPS,
    "tb_sk_msg": pins.SK_MSG,
    VISIT: pins.VISIT,
    TAKE_IN: pins.TAKE_IN,
}
MAP_PINS = (
    *(pins.CONNS, "halves"),
    *(pins.PODS, pins.COUNTERS, pins.SOCKHASH, pins.CONTROL, pins.PAUSED_PODS),
    *(pins.DUE, pins.BELL, pins.BEAT),
)
# What is needed to serve a generation of this version, or of one before.
PINS = (pins.SOCK_OPS, pins.SK_MSG, pins.VISIT, *MAP_PINS)
# What every version has pinned, so that a later one can take over its pods.
PINS_OF_ALL = (
    *(pins.SOCK_OPS, pins.SK_MSG),
    *(pins.PODS, pins.COUNTERS, pins.SOCKHASH, pins.CONTROL, pins.PAUSED_PODS),
)

_MODULE = "vmlinux__"

_Place = tuple[str, str]  # a struct, and the path of a member of it

# OFF_NAME in the programs; 0 for None, which this kernel has not.
_OFFSETS: dict[str, _Place | None] = {
    "BPF_MAP_ID": ("bpf_map", "id"),
    "FILE_FLAGS": ("file", "f_flags"),
    "ICSK_ULP_OPS": ("inet_connection_sock", "icsk_ulp_ops"),
    "NET_COOKIE": ("net", "net_cookie"),
    "NET_NS_INODE": ("net", "ns.inum"),
    "NET_TCP_RMEM": ("net", "ipv4.sysctl_tcp_rmem"),
    "POLL_WQUEUES_TASK": ("poll_wqueues", "polling_task"),
    "PROTO_MEMORY_ALLOCATED": ("proto", "memory_allocated"),
    "PROTO_MEMORY_PRESSURE": ("proto", "memory_pressure"),
    "PROTO_SYSCTL_MEM": ("proto", "sysctl_mem"),
    "PSOCK_INGRESS_MSG": ("sk_psock", "ingress_msg"),
    "PSOCK_LINK": ("sk_psock", "link"),
    "PSOCK_REFCNT": ("sk_psock", "refcnt"),
    "SK_MSG_LIST": ("sk_msg", "list"),
    "SK_MSG_SIZE": ("sk_msg", "sg.size"),
    "SK_PSOCK_LINK_MAP": ("sk_psock_link", "map"),
    "SOCKET_FILE": ("socket", "file"),
    "SOCKET_SK": ("socket", "sk"),
    "SOCKET_WQ_HEAD": ("socket_wq", "wait.head"),
    "SOCK_FILTER": ("sock", "sk_filter"),
    "SOCK_FLAGS": ("sock", "__sk_common.skc_flags"),
    "SOCK_LOCK_OWNED": ("sock", "sk_lock.owned"),
    "SOCK_NET": ("sock", "__sk_common.skc_net.net"),
    "SOCKOPT_SK": ("bpf_sockopt_kern", "sk"),
    "SOCK_OPS_SK": ("bpf_sock_ops_kern", "sk"),
    "SOCK_PEEK_OFF": ("sock", "sk_peek_off"),
    "SOCK_PROT": ("sock", "__sk_common.skc_prot"),
    "SOCK_RCVBUF": ("sock", "sk_rcvbuf"),
    "SOCK_RCVLOWAT": ("sock", "sk_rcvlowat"),
    "SOCK_SPINLOCK": ("sock", "sk_lock.slock"),
    "SOCK_SNDBUF": ("sock", "sk_sndbuf"),
    "SOCK_STATE": ("sock", "__sk_common.skc_state"),
    "SOCK_SOCKET": ("sock", "sk_socket"),
    "SOCK_TSFLAGS": ("sock", "sk_tsflags"),
    "SOCK_UID": ("sock", "sk_uid"),
    "SOCK_USER_DATA": ("sock", "sk_user_data"),
    "SOCK_WQ": ("sock", "sk_wq"),
    "TASK_FLAGS": ("task_struct", "flags"),
    "TASK_STACK": ("task_struct", "stack"),
    "TCP_REQUEST_RCV_ISN": ("tcp_request_sock", "rcv_isn"),
    "TCP_REQUEST_SNT_ISN": ("tcp_request_sock", "snt_isn"),
    "TCP_SOCK_BYTES_ACKED": ("tcp_sock", "bytes_acked"),
    "TCP_SOCK_BYTES_RECEIVED": ("tcp_sock", "bytes_received"),
    "TCP_SOCK_BYTES_RETRANS": ("tcp_sock", "bytes_retrans"),
    "TCP_SOCK_BYTES_SENT": ("tcp_sock", "bytes_sent"),
    "TCP_SOCK_CALLS": ("tcp_sock", "bpf_sock_ops_cb_flags"),
    "TCP_SOCK_COPIED_SEQ": ("tcp_sock", "copied_seq"),
    "TCP_SOCK_RCV_NXT": ("tcp_sock", "rcv_nxt"),
    "TCP_SOCK_RCV_WND": ("tcp_sock", "rcv_wnd"),
    "TCP_SOCK_SND_NXT": ("tcp_sock", "snd_nxt"),
    "TCP_SOCK_SND_UNA": ("tcp_sock", "snd_una"),
    "TCP_SOCK_URG_DATA": ("tcp_sock", "urg_data"),
    "TCP_SOCK_URG_SEQ": ("tcp_sock", "urg_seq"),
    "TCP_SOCK_WRITE_SEQ": ("tcp_sock", "write_seq"),
    "WAIT_ENTRY": ("wait_queue_entry", "entry"),
    "WAIT_PRIVATE": ("wait_queue_entry", "private"),
}

# In struct pt_regs: the number of the thread's system call and its arguments, each a member and
# bytes from there.
_REGISTERS = {
    "x86_64": {
        "CALL": ("orig_ax", 0),
        "THIRD": ("dx", 0),
        "FOURTH": ("r10", 0),
        "FOURTH_OF_32_BITS": ("si", 0),
    },
    "aarch64": {
        "CALL": ("syscallno", 0),
        "THIRD": ("regs", 16),
        "FOURTH": ("regs", 24),
        "FOURTH_OF_32_BITS": ("regs", 24),
    },
}
TCP_NAGLE_OFF, TCP_NAGLE_CORK = 1, 2  # in tcp_sock.nonagle, include/net/tcp.h
SOCK_RCVBUF_LOCK = 2  # in sock.sk_userlocks, include/net/sock.h: the application set SO_RCVBUF


class LoadError(Exception):
    """The programs could not be compiled, loaded or pinned; the message says why."""


@dataclass(frozen=True)
class Limits:
    """How many entries the maps hold. When one is full, new connections stay on TCP."""

    sockets: int = 262_144  # sockhash: two per connection; 16 bytes each are taken at once
    pending: int = 32_768  # LRU: ends that look for each other; about 200 bytes each, at once
    counters: int = 16_384  # pods times hops; taken as needed
    segments: int = 32  # so many a socket has received before it is looked at
    wanted: int = 4  # so many exchanges it then makes before each packet is looked at
    exchanges: int = 8  # and so many with each packet looked at, before it may join
    age_ms: int = 50  # and so old it is

    @property
    def before_joining(self) -> int:
        """Exchanges of a connection that go by TCP in any case."""
        return self.segments + self.wanted + self.exchanges


def kernel_flags(btf: KernelBTF) -> list[str]:
    """The compiler flags that specialise the programs to this kernel's struct layouts."""
    shrinks = ("net", "ipv4.sysctl_tcp_shrink_window")  # since Linux 6.5
    total = ("sk_psock", "msg_tot_len")  # since FIONREAD counts bypassed bytes, and TCP's no more
    optional = {
        "NET_TCP_SHRINK_WINDOW": shrinks if btf.has_member(*shrinks) else None,
        "PSOCK_MSG_TOT_LEN": total if btf.has_member(*total) else None,
    }
    members = _OFFSETS | optional | _memcg_members(btf)
    flags = _offset_flags(btf, members)
    flags += [
        f"-DOFF_PT_REGS_{name}={btf.member('pt_regs', member).offset + further}"
        for name, (member, further) in _REGISTERS[platform.machine()].items()
    ]
    # A kernel built without MPTCP has neither that struct nor the flag, and no such sockets.
    has_mptcp = btf.has_struct("mptcp_sock")
    is_mptcp = btf.member("tcp_sock", "is_mptcp") if has_mptcp else Member(0, 0)
    nonagle = btf.member("tcp_sock", "nonagle")
    userlocks = btf.member("sock", "sk_userlocks")
    flags += [
        f"-DOFF_TCP_SOCK_IS_MPTCP={is_mptcp.offset}",
        f"-DMASK_TCP_SOCK_IS_MPTCP={is_mptcp.mask:#x}",
        f"-DOFF_TCP_SOCK_NONAGLE={nonagle.offset}",
        f"-DMASK_TCP_NAGLE_OFF={TCP_NAGLE_OFF * nonagle.lowest_bit:#x}",
        f"-DMASK_TCP_NAGLE_CORK={TCP_NAGLE_CORK * nonagle.lowest_bit:#x}",
        f"-DOFF_SOCK_USERLOCKS={userlocks.offset}",
        f"-DMASK_SOCK_RCVBUF_LOCK={SOCK_RCVBUF_LOCK * userlocks.lowest_bit:#x}",
        f"-DTB_STRICT={int(has_hard_receive_limit(platform.release()))}",
        f"-DTB_INACTIVE_FILE={btf.enumerator('node_stat_item', 'NR_INACTIVE_FILE')}",
        f"-DPAGE_SIZE={resource.getpagesize()}",  # bcc's ring buffers are made of pages, too
        f"-DBIT_SOCK_DONE={btf.enumerator('sock_flags', 'SOCK_DONE')}",
        f"-DBIT_SOCK_MEMALLOC={btf.enumerator('sock_flags', 'SOCK_MEMALLOC')}",
        f"-DBIT_SOCK_RCVTSTAMP={btf.enumerator('sock_flags', 'SOCK_RCVTSTAMP')}",
        f"-DBIT_SOCK_URGINLINE={btf.enumerator('sock_flags', 'SOCK_URGINLINE')}",
        f"-DBIT_SOCK_ZEROCOPY={btf.enumerator('sock_flags', 'SOCK_ZEROCOPY')}",
    ]
    return flags


def lookup_flags(btf: KernelBTF) -> list[str]:
    """Those for a kernel where sockets are visited by their addresses: bpf/trust.py."""
    peer6 = ("sock", "__sk_common.skc_v6_daddr")  # not in a kernel built without IPv6
    own6 = ("sock", "__sk_common.skc_v6_rcv_saddr")
    members: dict[str, _Place | None] = {
        "INET_SPORT": ("inet_sock", "inet_sport"),
        "SOCK_BOUND_DEV_IF": ("sock", "__sk_common.skc_bound_dev_if"),
        "SOCK_DADDR": ("sock", "__sk_common.skc_daddr"),
        "SOCK_DPORT": ("sock", "__sk_common.skc_dport"),
        "SOCK_FAMILY": ("sock", "__sk_common.skc_family"),
        "SOCK_RCV_SADDR": ("sock", "__sk_common.skc_rcv_saddr"),
        "SOCK_STORAGE": ("sock", "sk_bpf_storage"),
        "SOCK_V6_DADDR": peer6 if btf.has_member(*peer6) else None,
        "SOCK_V6_RCV_SADDR": own6 if btf.has_member(*own6) else None,
        "STORAGE_DATA": ("bpf_local_storage_elem", "sdata.data"),
        "STORAGE_LIST": ("bpf_local_storage", "list"),
        "STORAGE_MAP": ("bpf_local_storage_elem", "sdata.smap"),
        "STORAGE_NODE": ("bpf_local_storage_elem", "snode"),
    }
    bit = btf.enumerator("sock_flags", "SOCK_RCU_FREE")
    return ["-DTB_BY_LOOKUP", f"-DBIT_SOCK_RCU_FREE={bit}", *_offset_flags(btf, members)]


def _offset_flags(btf: KernelBTF, members: Mapping[str, _Place | None]) -> list[str]:
    return [
        f"-DOFF_{name}={btf.member(*place).offset if place else 0}"
        for name, place in sorted(members.items())
    ]


def _version(release: str) -> tuple[int, ...]:
    """What uname -r says, as numbers: (6, 12, 117) for 6.12.117+deb13-amd64."""
    found = re.match(r"(\d+)\.(\d+)\.?(\d*)", release)
    return tuple(int(number or 0) for number in found.groups()) if found else ()


def has_hard_receive_limit(release: str) -> bool:
    """Whether this kernel's TCP drops segments beyond sk_rcvbuf, and the sender waits for a timer
    (tcp_can_ingest, of Linux 6.17; 7.0 and stable releases took it back)."""
    version = _version(release)
    return (6, 17) <= version < (6, 18, 17) or (6, 19) <= version < (6, 19, 7)


def takes_in(release: str) -> bool:
    """Whether this kernel lets connections from before be paired (tb_take_in())."""
    return _version(release) >= (6, 12)


def _memcg_members(btf: KernelBTF) -> dict[str, _Place | None]:
    """Where a socket is charged to its process' memory cgroup, and what that has and may have;
    nowhere without CONFIG_MEMCG.

    Its statistics are behind a pointer since Linux 6.1; those of the pages of files stand there
    where enum node_stat_item has them (mm/memcontrol.c: memcg_node_stat_items begins alike).
    """
    is_apart = btf.has_struct("memcg_vmstats") and not btf.has_member("mem_cgroup", "vmstats.state")
    members: dict[str, _Place | None] = {
        "MEMCG_MEMORY": ("mem_cgroup", "memory"),
        # Without it no file cache counts as free.
        "MEMCG_VMSTATS": ("mem_cgroup", "vmstats") if is_apart else None,
        "MEMCG_VMSTATS_STATE": ("memcg_vmstats", "state") if is_apart else None,
        "PAGE_COUNTER_HIGH": ("page_counter", "high"),
        "PAGE_COUNTER_MAX": ("page_counter", "max"),
        "PAGE_COUNTER_PARENT": ("page_counter", "parent"),
        "PAGE_COUNTER_USAGE": ("page_counter", "usage"),
        "SOCK_MEMCG": ("sock", "sk_memcg"),
    }
    return members if btf.has_member("sock", "sk_memcg") else dict.fromkeys(members)


@dataclass(frozen=True)
class Trace:
    """A program attached to a function of the kernel; its link is pinned under `pin`.

    `moment` is "kretfunc", the function's exit, or "kmod_ret", in its place.
    """

    program: str
    moment: str
    function: str
    pin: str


Instructions = ctypes.Array[ctypes.c_uint64]  # struct bpf_insn, little-endian


@dataclass(frozen=True)
class KernelFunction:
    """A kernel function that the programs call, for which bcc has no syntax.

    The compiler is made to call a helper that no kernel has, and link() mends that, before the
    program is loaded (struct bpf_insn, BPF_PSEUDO_KFUNC_CALL: linux/bpf.h).
    """

    btf_id: int
    flags: list[str]  # for the compiler

    PLACEHOLDER: ClassVar = 0x7FFFFFFF  # for the ID of a helper

    def link(self, instructions: Instructions) -> None:
        call_helper, call_kernel_function = 0x0085, 0x2085  # the code, and who is called
        for index, instruction in enumerate(instructions):
            if instruction == self.PLACEHOLDER << 32 | call_helper:
                instructions[index] = self.btf_id << 32 | call_kernel_function


def rdonly_cast(btf: KernelBTF) -> KernelFunction | None:
    """bpf_rdonly_cast(), with which kernel memory is read at a tenth of the cost; Linux 6.2.

    On x86-64 only: before 6.9 other JITs let such a load reach user addresses
    (commit 66e13b615a0c of Linux), and memory that is another's by now may hold one.
    """
    btf_id = btf.function("bpf_rdonly_cast")
    if btf_id is None or platform.machine() != "x86_64":
        return None
    flags = [
        f"-DTB_RDONLY_CAST={KernelFunction.PLACEHOLDER}",
        f"-DTB_ID_TIMESPEC64={btf.struct('timespec64')}",
        f"-DTB_ID_TCP_SOCK={btf.struct('tcp_sock')}",
    ]
    return KernelFunction(btf_id, flags)


def source_text() -> str:
    """The C file and the headers that are its own, as one text: bcc rewrites the accesses to maps
    in the main file only. The compiler's messages keep each file's name and lines."""
    text = SOURCE.read_text()

    def joined(include: re.Match[str]) -> str:
        header = _HERE / include[1]
        line = text.count("\n", 0, include.start()) + 2
        return f'#line 1 "{include[1]}"\n{header.read_text()}#line {line} "{SOURCE.name}"'

    return _INCLUDE.sub(joined, text)


def _bcc() -> Any:
    """The module bcc, told to do without kernel headers; raises LoadError."""
    os.environ["BCC_KERNEL_SOURCE"] = str(_HERE / "kernel")
    try:
        import bcc  # noqa: PLC0415 - loads libbcc and LLVM
    except ImportError as error:
        raise LoadError(
            f"cannot import bcc: {error}; install python3-bpfcc, and run under the"
            " distribution's own Python"
        ) from error
    return bcc


def names_modules(version: str) -> bool:
    """Whether this version of bcc wants `kfunc__vmlinux__FUNCTION`, and overruns a buffer without
    (bcc_prog_load_xattr); older ones want `kfunc__FUNCTION`."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) >= (0, 28)


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """What is written there meanwhile, also by C, is not seen."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Programs:
    """The compiled and loaded programs, held by this process until they are pinned."""

    def __init__(self, limits: Limits = Limits(), extra_flags: tuple[str, ...] = ()) -> None:
        bcc = _bcc()
        self._bcc, self._lib = bcc.BPF, bcc.lib
        self._names_modules = names_modules(bcc.__version__)
        flags = [
            f"-I{_HERE}",
            "-idirafter",
            "/usr/include",
            "-Wall",
            f"-DTB_MAX_SOCKETS={limits.sockets}",
            f"-DTB_MAX_PENDING={limits.pending}",
            f"-DTB_MAX_COUNTERS={limits.counters}",
            f"-DTB_MIN_SEGMENTS={limits.segments}",
            f"-DTB_FIRST_WANTED={limits.wanted}",
            f"-DTB_MIN_EXCHANGES={limits.exchanges}",
            f"-DTB_MIN_AGE_MS={limits.age_ms}ULL",
            *extra_flags,
        ]
        try:
            btf = KernelBTF()
            self._by_lookup = not trust.reaches_sockets(btf)
            flags += kernel_flags(btf) + (lookup_flags(btf) if self._by_lookup else [])
            self._build(flags, rdonly_cast(btf))
        except BTFError as error:
            raise LoadError(str(error)) from error
        except Exception as error:  # bcc raises bare Exception
            raise LoadError(f"bcc could not build the programs for this kernel: {error}") from error
        self.fds |= {name: self._map_fd(name) for name in MAP_PINS}
        bpfsys.map_update(self._map_fd("secret"), bytes(4), os.urandom(16))
        own_id = bpfsys.map_info(self.fds[pins.SOCKHASH]).id
        bpfsys.map_update(self._map_fd("sockhash_id"), bytes(4), own_id.to_bytes(4, sys.byteorder))
        self._attach_sk_msg()
        self.preemption = preemption.model()
        self.blind_to_splice = self._refuse_splice()

    def _build(self, flags: list[str], cast: KernelFunction | None) -> None:
        """Compiles and loads; without the kernel function where this kernel's JIT calls none."""
        more = cast.flags if cast else []
        self._bpf = self._bcc(text=source_text().encode(), cflags=flags + more)
        if cast:
            visitors = [VISIT_SOCKET] * self._by_lookup
            for name in (*PROGRAM_PINS, REFUSE, MEND, *visitors):
                cast.link(self._instructions(name))
        try:
            self.fds = {
                "tb_sock_ops": self._load("tb_sock_ops", self._bcc.SOCK_OPS),
                "tb_sk_msg": self._load("tb_sk_msg", self._bcc.SK_MSG),
                VISIT: self._load(VISIT, self._bcc.TRACING, "bpf_iter__task_file"),
                TAKE_IN: self._load(
                    TAKE_IN, bpfsys.PROG_TYPE_CGROUP_SOCKOPT, expected=bpfsys.CGROUP_SETSOCKOPT
                ),
            }
            if self._by_lookup:
                self._load_visitor()
        except OSError:
            if not cast:
                raise
            self._bpf.cleanup()
            self._build(flags, None)

    def _load_visitor(self) -> None:
        """The program that visits sockets; the one that visits files knows its ID."""
        visitor = self._load(VISIT_SOCKET, self._bcc.SCHED_CLS)
        self.fds[pins.VISIT_SOCKET] = visitor
        ids = (bpfsys.prog_info(visitor).id, bpfsys.map_info(self._map_fd(pins.CONNS)).id)
        bpfsys.map_update(self._map_fd("own_ids"), bytes(4), struct.pack("=II", *ids))

    def _load(self, function: str, kind: int, attached_as: str = "", *, expected: int = -1) -> int:
        """The file descriptor of one program; raises OSError with the verifier's last words.

        `attached_as` is the name from which bcc knows what the program is attached to; `expected`
        is of enum bpf_attach_type, for kinds that need it.
        """
        module, name = self._bpf.module, function.encode()

        def load(*log: Any) -> int:
            start = self._lib.bpf_function_start(module, name)
            size = self._lib.bpf_function_size(module, name)
            fd: int = self._lib.bcc_func_load(
                *(module, kind, (attached_as or function).encode(), start, size),
                *(self._lib.bpf_module_license(module), self._lib.bpf_module_kern_version(module)),
                *(*log, None, expected),
            )
            return fd

        with _without_stderr():  # libbcc writes there what the error below says
            fd = load(0, None, 0)
            error = ctypes.get_errno()
            if fd < 0:
                log = ctypes.create_string_buffer(1 << 24)
                load(1, log, len(log))
        if fd < 0:
            said = " | ".join(log.value.decode(errors="replace").splitlines()[-3:])
            raise OSError(error, f"{function}: {os.strerror(error)} {said}".strip())
        return fd

    def _refuse_splice(self) -> str:
        """Why members will not refuse to be spliced from; empty when they will."""
        why = self._trace(
            Trace(REFUSE, "kmod_ret", "security_file_permission", pins.SPLICE_REFUSAL)
        )
        if not why:
            self.fds[pins.SPLICERS] = self._map_fd(pins.SPLICERS)
        return why

    def mend_fionread(self) -> str:
        """Why FIONREAD stays as this kernel has it; empty when it now says what TCP would."""
        traces = (Trace(MEND, "kretfunc", name, pin) for pin, name in MENDED.items())
        if why := self._trace(*traces):
            return why
        self.fds[pins.FIONREAD] = self._map_fd(pins.FIONREAD)
        return ""

    def _trace(self, *traces: Trace) -> str:
        """Attaches all of them, or none; what the kernel said of the one that it refuses.

        Twice, as two programs, where a thread may be preempted inside one.
        """
        wanted = list(traces)
        if preemption.is_within_programs(self.preemption):
            wanted += [replace(each, pin=each.pin + pins.AGAIN) for each in traces]
        for trace in wanted:
            if why := self._attach(trace):
                for attached in {each.pin for each in wanted} & self.fds.keys():
                    os.close(self.fds.pop(attached))
                return f"{trace.function}: {why}"
        return ""

    def _attach(self, trace: Trace) -> str:
        """What the kernel said if it refuses."""
        module = _MODULE if self._names_modules else ""
        attached_as = f"{trace.moment}__{module}{trace.function}"
        try:
            program = self._load(trace.program, self._bcc.TRACING, attached_as)
        except OSError as error:
            return f"the kernel refuses the program: {error.strerror}"
        with bpfsys.closing(program):
            link: int = self._lib.bpf_attach_kfunc(program)
        if link < 0:
            return f"the kernel refuses to attach it: {os.strerror(ctypes.get_errno())}"
        self.fds[trace.pin] = link
        return ""

    def _instructions(self, program: str) -> Instructions:
        """The compiled program where bcc holds it until it is loaded."""
        module, name = self._bpf.module, program.encode()
        size: int = self._lib.bpf_function_size(module, name)
        start: int = self._lib.bpf_function_start(module, name)
        return (ctypes.c_uint64 * (size // 8)).from_address(start)

    def _map_fd(self, name: str) -> int:
        fd: int = self._lib.bpf_table_fd(self._bpf.module, name.encode())
        if fd < 0:
            raise LoadError(f"bcc made no map {name}")
        return fd

    def _attach_sk_msg(self) -> None:
        sk_msg_verdict = 7  # BPF_SK_MSG_VERDICT, linux/bpf.h
        if self._lib.bpf_prog_attach(
            self.fds["tb_sk_msg"], self.fds[pins.SOCKHASH], sk_msg_verdict, 0
        ):
            raise LoadError("the kernel refused to attach tb_sk_msg to the sockhash")

    def close(self) -> None:
        """Closes all file descriptors: the kernel keeps what is pinned, attached or in use."""
        for name in self.fds.keys() - {*MAP_PINS, pins.FIONREAD, pins.SPLICERS}:
            os.close(self.fds.pop(name))
        self._bpf.cleanup()  # the maps'
        atexit.unregister(self._bpf.cleanup)

    def pin(self, folder: Path, obj_pin: Callable[[int, str], None]) -> None:
        """Pins programs and maps in `folder`, a new folder on a bpffs."""
        folder.mkdir(mode=0o700)
        for name, fd in self.fds.items():
            path = folder / PROGRAM_PINS.get(name, name)
            try:
                obj_pin(fd, str(path))
            except OSError as error:
                hint = ""
                if error.errno == errno.EPERM:
                    hint = f"; is {folder.parent} on a bpffs? (mount -t bpf bpf /sys/fs/bpf)"
                raise LoadError(f"cannot pin {name} at {path}: {error.strerror}{hint}") from error
