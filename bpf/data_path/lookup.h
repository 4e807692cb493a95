/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Visits where the kernel does not let a program go from a file to its socket: bpf/trust.py.
 *
 * There the visit to a file only names its socket, if a visit would do anything. Then user space
 * (install/program/lookups.py) holds the file, as the iterator does elsewhere. It goes to the
 * socket's network namespace and runs tb_visit_socket(). This looks the socket up by its
 * addresses.
 *
 * RULE (lookup). What is visited is the very socket that was named: its place in memory is
 * compared. One in TCP_CLOSE cannot be looked up. So what it may need is done as it is met: an
 * edge, and to leave.
 */

#ifdef TB_BY_LOOKUP

#define TB_MAX_STORAGES 16 /* maps like `conns` that one socket is in */
#define TB_AT_PACKET 14	   /* behind the Ethernet header that BPF_PROG_RUN asks for */

/* IDs of the kernel's. */
struct tb_ids {
	__u32 visitor; /* of program tb_visit_socket */
	__u32 conns;   /* of map `conns` */
};

BPF_ARRAY(own_ids, struct tb_ids, 1); /* written by the loader */

/* Where a socket's struct tb_conn lies, 0 if it has none, by the ID of map `conns`. Each generation
 * of these programs has a map of its own. A struct bpf_local_storage_map begins with its bpf_map.
 */
static __always_inline __u64 tb_conn_at(__u64 sk, __u32 conns_id)
{
	__u64 storage = tb_read64(sk + OFF_SOCK_STORAGE), node, element, map;
	int i;

	if (!storage)
		return 0;
	node = tb_read64(storage + OFF_STORAGE_LIST);
#pragma clang loop unroll(disable)
	for (i = 0; i < TB_MAX_STORAGES && node; i++) {
		element = node - OFF_STORAGE_NODE;
		map = tb_read64(element + OFF_STORAGE_MAP);
		if (map && tb_read32(map + OFF_BPF_MAP_ID) == conns_id)
			return element + OFF_STORAGE_DATA;
		node = tb_read64(node);
	}
	return 0;
}

/* Would tb_visit() do anything? */
static __always_inline int tb_is_due(const struct tb_conn *conn, __u64 sk, __u64 now)
{
	__u32 membership = tb_membership(conn->state);

	if (membership == TB_OUT)
		return (conn->path == TB_PATH_BEHIND && tb_has_peer(conn) &&
			tb_has_read_on(conn)) ||
		       (!conn->refused && tb_may_join(conn, sk, now));
	if (!conn->refused && tb_reason_to_refuse(conn, sk))
		return 1;
	return !tb_must_stay(conn, sk) &&
	       (membership == TB_LEAVING || tb_psock(sk) != conn->at.psock ||
		tb_is_to_leave(conn, now));
}

/* A member in TCP_CLOSE: no send at either end begins on the bypass any more. Not while a thread
 * owns its lock: an edge may be owed, still. */
static __always_inline void tb_leave_closed(const struct tb_conn *conn, __u64 sk)
{
	__u64 id = conn->me.id;

	if (tb_membership(conn->state) == TB_OUT || tb_psock(sk) != conn->at.psock ||
	    tb_must_stay(conn, sk))
		return;
	if (!tb_is_owned(sk) && tb_is_idle(conn) && tb_is_drained(conn))
		sockhash.delete(&id);
	else
		tb_ring(conn->me.pod_id);
}

static __always_inline void tb_read_address(struct tb_addr *addr, __u64 sk, __u32 v4, __u32 v6)
{
	__u32 family = OFF_SOCK_V6_DADDR ? TB_READ(__u16, sk + OFF_SOCK_FAMILY) : AF_INET;

	tb_addr_select(family, tb_read32(sk + v4), tb_read32(sk + v6), tb_read32(sk + v6 + 4),
		       tb_read32(sk + v6 + 8), tb_read32(sk + v6 + 12), addr);
}

static __always_inline void tb_read_addresses(struct tb_found *found, __u64 sk)
{
	tb_read_address(&found->peer, sk, OFF_SOCK_DADDR, OFF_SOCK_V6_DADDR);
	tb_read_address(&found->own, sk, OFF_SOCK_RCV_SADDR, OFF_SOCK_V6_RCV_SADDR);
	found->peer_port = TB_READ(__u16, sk + OFF_SOCK_DPORT);
	found->own_port = TB_READ(__u16, sk + OFF_INET_SPORT);
	found->device = tb_read32(sk + OFF_SOCK_BOUND_DEV_IF);
	found->netns = tb_read32(tb_netns_of(sk) + OFF_NET_NS_INODE);
}

/* In place of the one in tcpip_bypass.c: writes a struct tb_found for a socket to be visited. */
int tb_visit_file(__u64 *context)
{
	void *meta = (void *)context[0], *file = (void *)context[3], *socket;
	struct tb_found found = {.mark = TB_LOOK_UP, .fd = context[2]};
	struct tb_ids *ids;
	struct tb_conn conn;
	__u64 now = bpf_ktime_get_ns(), at;
	int zero = 0, needs_edge;

	tb_end_read(meta);
	ids = own_ids.lookup(&zero);
	if (!file || !ids)
		return 0;
	socket = tb_sock_from_file(file);
	if (!socket)
		return 0;
	found.sk = tb_read64((__u64)socket + OFF_SOCKET_SK);
	found.visitor = ids->visitor;
	at = found.sk ? tb_conn_at(found.sk, ids->conns) : 0;
	/* The kernel drops no reference to a socket that was a listener (bpf_sk_release). */
	if (!at || (tb_read64(found.sk + OFF_SOCK_FLAGS) & (1ULL << BIT_SOCK_RCU_FREE)) ||
	    tb_probe_read_kernel(&conn, sizeof(conn), (void *)at) || !conn.me.id)
		return 0;
	found.cookie = conn.me.id >> TB_ID_SHIFT;
	needs_edge = tb_may_be_behind(&conn) && tb_find_edge(&conn, found.sk);
	if (tb_tcp_state(found.sk) == BPF_TCP_CLOSE) {
		if (needs_edge)
			bpf_seq_write(*(void *volatile *)meta, &found.fd, sizeof(found.fd));
		tb_leave_closed(&conn, found.sk);
	} else if (needs_edge || tb_is_due(&conn, found.sk, now)) {
		tb_read_addresses(&found, found.sk);
		bpf_seq_write(*(void *volatile *)meta, &found, sizeof(found));
	}
	return 0;
}

static void *(*tb_sk_lookup)(void *context, void *tuple, __u32 size, __u64 netns,
			     __u64 flags) = (void *)BPF_FUNC_sk_lookup_tcp;
static long (*tb_load_bytes)(void *packet, __u32 at, void *to,
			     __u32 size) = (void *)BPF_FUNC_skb_load_bytes;
static long (*tb_release)(void *socket) = (void *)BPF_FUNC_sk_release;

#define TB_CURRENT_NETNS -1ULL /* BPF_F_CURRENT_NETNS */

/* `packet` holds a struct tb_found; returns enum tb_needs. */
int tb_visit_socket(struct __sk_buff *packet)
{
	struct tb_found found;
	__u32 size = sizeof(((struct bpf_sock_tuple *)0)->ipv6);
	void *socket;
	int needs = 0;

	if (tb_load_bytes(packet, TB_AT_PACKET, &found, sizeof(found)))
		return 0;
	if (!found.peer.word[0] && !found.peer.word[1] &&
	    found.peer.word[2] == bpf_htonl(0xffff)) { /* IPv4 */
		found.peer.word[0] = found.peer.word[3];
		found.peer.word[1] = found.own.word[3];
		found.peer.word[2] = *(__u32 *)&found.peer_port;
		size = sizeof(((struct bpf_sock_tuple *)0)->ipv4);
	}
	socket = tb_sk_lookup(packet, &found.peer, size, TB_CURRENT_NETNS, 0);
	if (!socket)
		return 0;
	if ((__u64)socket == found.sk) /* volatile: a number that may be added to */
		needs = tb_visit(socket, *(volatile __u64 *)&found.sk);
	tb_release(socket);
	return needs;
}

#endif
