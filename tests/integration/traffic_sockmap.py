# SPDX-License-Identifier: Apache-2.0
"""Another program's sockmap: it takes every connection of a cgroup before we can, or a member."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path
from typing import Literal, get_args

from bcc import BPF, lib

from bpf import bpfsys
from bpf.loader import SOURCE as OURS

Kind = Literal["no program", "sk_msg", "sk_skb verdict", "sk_skb parser"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# enum bpf_attach_type, linux/bpf.h
CGROUP_SOCK_OPS, ALLOW_MULTI = 3, 2
SK_SKB_STREAM_PARSER, SK_SKB_STREAM_VERDICT, SK_MSG_VERDICT, SK_SKB_VERDICT = 4, 5, 7, 38

SOURCE = r"""
#include <uapi/linux/bpf.h>

BPF_SOCKHASH(theirs, __u64, 1024);
BPF_ARRAY(results, __u64, 2);

int their_sock_ops(struct bpf_sock_ops *skops)
{
    __u64 cookie = bpf_get_socket_cookie(skops), *count;
    int refused;

    if (skops->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB &&
        skops->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
        return 1;
    refused = !!theirs.sock_hash_update(skops, &cookie, BPF_ANY);
    count = results.lookup(&refused);
    if (count)
        __sync_fetch_and_add(count, 1);
    return 1;
}

int their_sk_msg(struct sk_msg_md *msg)
{
    return SK_PASS;
}

int their_verdict(struct __sk_buff *skb)
{
    return SK_PASS;
}

int their_parser(struct __sk_buff *skb)
{
    return skb->len;
}
"""


class OtherProgram:
    """A sock_ops program that puts every socket into its own sockhash, which has these programs."""

    def __init__(self, kind: Kind) -> None:
        os.environ["BCC_KERNEL_SOURCE"] = str(OURS.parent / "kernel")
        inline = "-D__always_inline=inline __attribute__((always_inline))"
        self._bpf = BPF(text=SOURCE, cflags=[inline, "-idirafter", "/usr/include"])
        self._sock_ops = self._bpf.load_func("their_sock_ops", BPF.SOCK_OPS)
        if kind == "sk_msg":
            self._attach("their_sk_msg", BPF.SK_MSG, SK_MSG_VERDICT)
        elif kind == "sk_skb verdict":
            self._attach("their_verdict", BPF.SK_SKB, SK_SKB_VERDICT)
        elif kind == "sk_skb parser":
            self._attach("their_verdict", BPF.SK_SKB, SK_SKB_STREAM_VERDICT)
            self._attach("their_parser", BPF.SK_SKB, SK_SKB_STREAM_PARSER)

    def _attach(self, function: str, program_type: int, attach_type: int) -> None:
        program = self._bpf.load_func(function, program_type)
        assert lib.bpf_prog_attach(program.fd, self._sockhash, attach_type, 0) == 0

    def attach(self, cgroup: Path) -> None:
        """To a cgroup, behind what is attached already; goes with the cgroup."""
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        assert lib.bpf_prog_attach(self._sock_ops.fd, fd, CGROUP_SOCK_OPS, ALLOW_MULTI) == 0
        os.close(fd)

    def take(self, sock: socket.socket) -> int:
        """Puts an open socket into it, as a program in user space does.

        Returns the kernel's errno, 0 when it has the socket now.
        """
        key = sock.fileno().to_bytes(8, sys.byteorder)
        try:
            bpfsys.map_update(self._sockhash, key, key[:4])
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def let_go(self, sock: socket.socket) -> None:
        """Takes out what take() has put into it."""
        bpfsys.map_delete(self._sockhash, sock.fileno().to_bytes(8, sys.byteorder))

    @property
    def _sockhash(self) -> int:
        return int(lib.bpf_table_fd(self._bpf.module, b"theirs"))

    def joined(self) -> int:
        """How many sockets it took."""
        return int(self._bpf["results"][0].value)

    def refused(self) -> int:
        """How many sockets the kernel would not give it."""
        return int(self._bpf["results"][1].value)
