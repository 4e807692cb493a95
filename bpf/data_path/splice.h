/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Readers that splice.
 *
 * RULE (splice). splice(2) takes bytes from TCP's own queue alone (tcp_splice_read): it never sees
 * bypassed ones. So on a member it says EINVAL, as for any file that cannot splice, and the
 * application reads instead. A socket that has spliced never joins; readers that splice mostly
 * begin with it, before their socket is remembered. So one that still calls per round trip gets a
 * struct tb_conn for that alone. Where these programs cannot be attached, no application's socket
 * joins: the mode is `proxy-only`.
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
#define X32 0x40000000

static __always_inline int tb_is_splice(__u32 call)
{
	call &= ~X32;
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

/* Attached to security_file_permission(struct file *, int), which each read(2) and write(2) asks,
 * too, and splice(2) before it calls tcp_splice_read(). Other than 0, its result is the answer. */
int tb_refuse_splice(__u64 *arguments)
{
	void *file = (void *)arguments[0], *socket;

	if (!((__u32)arguments[1] & MAY_READ))
		return 0;
	socket = tb_sock_from_file(file);
	if (!socket || !tb_is_splice(tb_current_call()))
		return 0;
	socket = *(void *volatile *)(socket + OFF_SOCKET_SK); /* its struct sock */
	if (socket)
		socket = bpf_skc_to_tcp_sock(socket);
	return socket && tb_is_in_sockhash((__u64)socket) ? -EINVAL : 0;
}

/* Attached to the entry of tcp_splice_read(struct socket *, ...), net/ipv4/tcp.c. */
int tb_watch_splice(__u64 *arguments)
{
	void *socket = (void *)arguments[0], *sk;
	struct tb_conn *conn;
	int is_young;

	sk = *(void *volatile *)(socket + OFF_SOCKET_SK);
	if (!sk)
		return 0;
	is_young = tb_read8((__u64)sk + OFF_TCP_SOCK_CB_FLAGS) & TB_CALL_PER_ROUND_TRIP;
	conn = conns.sk_storage_get(sk, 0, is_young ? BPF_SK_STORAGE_GET_F_CREATE : 0);
	if (!conn)
		return 0;
	if (conn->me.id == TB_CANARY || conn->me.id == TB_CANARY_SPLICED) {
		conn->me.id = TB_CANARY_SPLICED;
		return 0;
	}
	if (!conn->me.id)
		conn->refused = TB_OUTCOME_SPLICE; /* tb_meet() counts it */
	else if (!conn->refused)
		tb_refuse(conn, TB_OUTCOME_SPLICE);
	if (tb_membership(conn->state) != TB_OUT)
		tb_ring(conn->me.pod_id);
	return 0;
}
