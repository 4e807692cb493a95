/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Visits where the kernel does not let a program go from a file to its socket: bpf/trust.py.
 *
 * There the visit to a file only names its socket, if a visit would do anything. Then user space
 * (install/program/lookups.py) holds the file, as the iterator does elsewhere. It goes to the
 * process's network namespace and runs tb_visit_socket(). This looks the socket up by its
 * addresses.
 *
 * RULE (lookup). What is visited is the very socket that was named: its place in memory is
 * compared.
 */

#ifdef TB_BY_LOOKUP

#define TB_MAX_STORAGES 16 /* maps like `conns` that one socket is in */
#define TB_AT_PACKET 14	   /* behind the Ethernet header that BPF_PROG_RUN asks for */

BPF_ARRAY(visitor, __u32, 1); /* the kernel's ID of program tb_visit_socket */

/* Where a socket's struct tb_conn lies, 0 if it has none. Of all that BPF programs have stored with
 * the socket, it is what names the socket. */
static __always_inline __u64 tb_conn_at(__u64 sk)
{
	__u64 storage = tb_read64(sk + OFF_SOCK_STORAGE), node, conn;
	int i;

	if (!storage)
		return 0;
	node = tb_read64(storage + OFF_STORAGE_LIST);
#pragma clang loop unroll(disable)
	for (i = 0; i < TB_MAX_STORAGES && node; i++) {
		conn = node - OFF_STORAGE_NODE + OFF_STORAGE_DATA;
		if (tb_read64(conn + offsetof(struct tb_conn, me.sk)) == sk)
			return conn;
		node = tb_read64(node);
	}
	return 0;
}

/* Would tb_visit() do anything? */
static __always_inline int tb_is_due(const struct tb_conn *conn, __u64 sk, __u64 now)
{
	__u32 membership = tb_membership(conn->state);

	if (!conn->me.id || tb_tcp_state(sk) == BPF_TCP_CLOSE) /* it could not be found */
		return 0;
	if (tb_may_be_behind(conn))
		return 1;
	if (membership == TB_OUT)
		return conn->path == TB_PATH_BEHIND ||
		       (!conn->refused && tb_may_join(conn, sk, now));
	return membership == TB_LEAVING || tb_psock(sk) != conn->at.psock ||
	       (!conn->refused && tb_reason_to_refuse(conn, sk)) || tb_is_to_leave(conn, now);
}

/* In place of the one in tcpip_bypass.c: writes a struct tb_found for a socket to be visited. */
int tb_visit_file(__u64 *context)
{
	void *meta = (void *)context[0], *file = (void *)context[3], *socket;
	struct tb_found found = {.mark = TB_LOOK_UP, .fd = context[2]};
	struct tb_conn conn;
	__u64 at = 0;
	int zero = 0;
	__u32 *id = visitor.lookup(&zero);

	if (!file || !id)
		return 0;
	socket = tb_sock_from_file(file);
	if (!socket)
		return 0;
	found.sk = tb_read64((__u64)socket + OFF_SOCKET_SK);
	found.visitor = *id;
	if (found.sk)
		at = tb_conn_at(found.sk);
	if (at && !tb_probe_read_kernel(&conn, sizeof(conn), (void *)at) &&
	    tb_is_due(&conn, found.sk, bpf_ktime_get_ns()))
		bpf_seq_write(*(void *volatile *)meta, &found, sizeof(found));
	return 0;
}

static void *(*tb_sk_lookup)(void *context, void *tuple, __u32 size, __u64 netns,
			     __u64 flags) = (void *)BPF_FUNC_sk_lookup_tcp;
static long (*tb_load_bytes)(void *packet, __u32 at, void *to,
			     __u32 size) = (void *)BPF_FUNC_skb_load_bytes;
static long (*tb_release)(void *socket) = (void *)BPF_FUNC_sk_release;

#define TB_CURRENT_NETNS -1ULL /* BPF_F_CURRENT_NETNS */

/* `packet` holds a struct tb_lookup; returns enum tb_needs. */
int tb_visit_socket(struct __sk_buff *packet)
{
	struct tb_lookup named;
	void *socket;
	int needs = 0;

	if (tb_load_bytes(packet, TB_AT_PACKET, &named, sizeof(named)))
		return 0;
	if (named.is_ipv4)
		socket = tb_sk_lookup(packet, named.tuple,
				      sizeof(((struct bpf_sock_tuple *)0)->ipv4), TB_CURRENT_NETNS,
				      0);
	else
		socket = tb_sk_lookup(packet, named.tuple,
				      sizeof(((struct bpf_sock_tuple *)0)->ipv6), TB_CURRENT_NETNS,
				      0);
	if (!socket)
		return 0;
	if ((__u64)socket == named.sk) /* volatile: an address that may be added to */
		needs = tb_visit(socket, *(volatile __u64 *)&named.sk);
	tb_release(socket);
	return needs;
}

#endif
