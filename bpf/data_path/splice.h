/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Readers that splice.
 *
 * RULE (splice). splice(2) takes bytes from TCP's own queue alone (tcp_splice_read): it never sees
 * bypassed ones. So a socket on which it was called does not join, nor does any other of an
 * application of its pod, and members leave. On a member it says EINVAL, as for any file that
 * cannot splice, and the application reads instead. The call is noted before the sockhash is asked.
 * A visit puts a socket into the sockhash before it looks for a note, and takes it out again. So
 * one of the two sees the other. An application does not expect EINVAL after a splice that went
 * well: what was allowed once stays so.
 *
 * A splice by io_uring looks like its read: both are noted, and neither is refused. Where this
 * program cannot be attached, no application's socket joins: the mode is `proxy-only`.
 */

#define EINVAL 22
#define MAY_READ 4

/* System calls that splice from a socket: splice and sendfile, and those of 32-bit callers. */
#ifdef __aarch64__
#define SPLICE 76
#define SPLICE_OF_32_BITS 340
#define SENDFILE 71
#else
#define SPLICE 275
#define SPLICE_OF_32_BITS 313
#define SENDFILE 40
#endif
#define SENDFILE_OF_32_BITS 187
#define SENDFILE64_OF_32_BITS 239

static __always_inline int tb_is_splice(__u32 call)
{
	return call == SPLICE || call == SPLICE_OF_32_BITS || call == SENDFILE ||
	       call == SENDFILE_OF_32_BITS || call == SENDFILE64_OF_32_BITS;
}

/* Is a TCP socket in this sockhash, by its psock? A sockhash that has it first is first in the list
 * of its psock (struct sk_psock_link). The storage is not to be asked here. */
static __always_inline int tb_is_in_sockhash(__u64 sk)
{
	__u64 psock = tb_psock(sk), link, map;
	int zero = 0;
	__u32 *id = sockhash_id.lookup(&zero);

	if (!psock || !id)
		return 0;
	link = tb_read64(psock + OFF_PSOCK_LINK);
	if (link == psock + OFF_PSOCK_LINK)
		return 0;
	map = tb_read64(link + OFF_SK_PSOCK_LINK_MAP);
	return map && tb_read32(map + OFF_BPF_MAP_ID) == *id;
}

/* A thread asks to splice from this struct tcp_sock, which is noted. Returns 1 if it may. */
static __always_inline int tb_ask_to_splice(void *socket, int is_splice)
{
	__u64 cookie = tb_socket_cookie(socket);
	__u64 netns = tb_netns_cookie((__u64)socket);
	__u32 asked = TB_SPLICE_ASKED, allowed = TB_SPLICE_ALLOWED, one = 1;
	__u32 *note = splicers.lookup(&cookie);

	if (is_splice && !splicing.lookup(&netns))
		splicing.insert(&netns, &one);
	if (note && *note == TB_SPLICE_ALLOWED)
		return 1;
	if (!note)
		splicers.insert(&cookie, &asked);
	tb_order_looks();
	if (!is_splice)
		return 1;
	if (tb_is_in_sockhash((__u64)socket))
		return 0;
	splicers.update(&cookie, &allowed);
	return 1;
}

/* Attached to security_file_permission(struct file *, int), which each read(2) and write(2) asks,
 * too, and splice(2) before it calls tcp_splice_read(). Other than 0, its result is the answer. */
int tb_refuse_splice(__u64 *arguments)
{
	void *file = (void *)arguments[0], *socket;
	int is_splice;
	__u32 call;

	if (!((__u32)arguments[1] & MAY_READ))
		return 0;
	socket = tb_sock_from_file(file);
	if (!socket)
		return 0;
	call = tb_call_of(tb_current_task_btf());
	is_splice = tb_is_splice(call);
	if (!is_splice && call != IO_URING_ENTER && call != TB_UNKNOWN_CALL)
		return 0;
	socket = *(void *volatile *)(socket + OFF_SOCKET_SK); /* its struct sock */
	if (socket)
		socket = bpf_skc_to_tcp_sock(socket);
	return !socket || tb_ask_to_splice(socket, is_splice) ? 0 : -EINVAL;
}
