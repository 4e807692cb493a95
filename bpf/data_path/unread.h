/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What a peer may have unread.
 *
 * RULE (bound). The kernel never stops a sender that redirects. So past a bound the bytes go by
 * TCP, and its window stops it. The bound leaves TCP its room. Kernels charge redirected bytes to
 * their receiver, and its TCP drops what does not fit beside them, be it a FIN; the sender finds
 * out by a timer, 0.2 s later. Two limits hold:
 *   - while the peer is inside a read, 2 * sk_rcvbuf + sk_sndbuf / 2 (tcp_add_to_backlog). One
 *     sk_rcvbuf of that is left to TCP, which makes its window from it. An application's bound
 *     has half as much of sk_sndbuf as a sidecar's;
 *   - else tcp_rmem[2], up to which sk_rcvbuf may grow (tcp_clamp_window). Half is left to TCP.
 *
 * RULE (memory). Unread bytes are charged to their reader's container. TCP charges from interrupts,
 * past the limit if need be. A redirect charges from the sender's system call, which may sleep;
 * past the limit the kernel kills a process of the container, and past memory.high it slows the
 * sender. So a connection takes but a share of what the limits leave.
 */

#define TB_MESSAGE_COST 1024	   /* what the kernel allocates beside a message's bytes */
#define TB_LOOK 16384		   /* below it, the peer's queue is not looked at */
#define TB_MAX_BOUND (2 << 20)	   /* however large the peer's buffers are */
#define TB_TCP_RESERVE (64 * 1024) /* always left to the peer's TCP */
/* A 16th of a memory limit stays free, TB_AMPLE pages at most. A connection takes at most a 16th of
 * the rest. So many nested cgroups are looked at. */
#define TB_RESERVE 16
#define TB_SHARE 16
#define TB_AMPLE (TB_SHARE * TB_MAX_BOUND / PAGE_SIZE)
#define TB_LEVELS 4

/* What a message takes of the node's memory. */
static __always_inline __u32 tb_cost(__u32 size)
{
	return size + TB_MESSAGE_COST;
}

/* How much this peer may have unread, in bytes of tb_cost(); 0: it gets no bypassed bytes. Where
 * TB_STRICT, TCP drops all that passes sk_rcvbuf; there the window that it has offered is left to
 * it, and at least half of sk_rcvbuf. */
static __always_inline __u32 tb_bound(const struct tb_end *peer)
{
	__u64 net = tb_netns_of(peer->sk);
	__u32 rcvbuf = tb_read32(peer->sk + OFF_SOCK_RCVBUF);
	__u32 sndbuf = tb_read32(peer->sk + OFF_SOCK_SNDBUF);
	__u32 most = tb_read32(net + OFF_NET_TCP_RMEM + 2 * sizeof(__u32)) / 2;

	if (most < 2 * TB_TCP_RESERVE ||
	    (OFF_NET_TCP_SHRINK_WINDOW && tb_read8(net + OFF_NET_TCP_SHRINK_WINDOW)))
		return 0;
	if (TB_STRICT) {
		__u32 window = tb_read32(peer->sk + OFF_TCP_SOCK_RCV_WND);

		return tb_min(rcvbuf / 4, (rcvbuf - tb_min(rcvbuf, window)) / 2);
	}
	return tb_min(tb_min(most - TB_TCP_RESERVE, TB_MAX_BOUND),
		      rcvbuf + sndbuf / (peer->is_proxy ? 2 : 4));
}

/* Pages of files that reclaim takes first, of a memory cgroup and those below it. The kernel's
 * statistics are two seconds old and may be negative, and some pages must be written first: half of
 * them count. */
static __always_inline __u64 tb_cached(__u64 memcg)
{
	__u64 stats;
	__s64 pages;

	if (!OFF_MEMCG_VMSTATS)
		return 0;
	stats = tb_read64(memcg + OFF_MEMCG_VMSTATS) + OFF_MEMCG_VMSTATS_STATE;
	pages = tb_read64(stats + sizeof(__u64) * TB_INACTIVE_FILE);
	return pages > 0 ? (__u64)pages / 2 : 0;
}

/* Bytes that a memory cgroup may still be charged beyond its reserve, from its struct page_counter,
 * which is a member of it. */
static __always_inline __u64 tb_free(__u64 counter)
{
	__u64 limit = tb_read64(counter + OFF_PAGE_COUNTER_MAX);
	__u64 high =
		tb_read64(counter + OFF_PAGE_COUNTER_HIGH); /* past it the sender would be slowed */
	__u64 used = tb_read64(counter + OFF_PAGE_COUNTER_USAGE);
	__u64 reserve;

	limit = high < limit ? high : limit;
	reserve = limit / TB_RESERVE;
	limit -= reserve < TB_AMPLE ? reserve : TB_AMPLE;
	if (used + TB_AMPLE > limit)
		limit += tb_cached(counter - OFF_MEMCG_MEMORY);
	return used < limit ? (limit - used) * PAGE_SIZE : 0;
}

/* How many bytes a socket's container leaves one connection: RULE (memory). */
static __always_inline __u64 tb_room(__u64 sk)
{
	__u64 memcg = OFF_SOCK_MEMCG ? tb_read64(sk + OFF_SOCK_MEMCG) : 0;
	__u64 counter = memcg ? memcg + OFF_MEMCG_MEMORY : 0, least = ~0ULL;
	int level;

#pragma unroll
	for (level = 0; level < TB_LEVELS; level++) {
		__u64 bytes = counter ? tb_free(counter) : ~0ULL;

		least = bytes < least ? bytes : least;
		counter = counter ? tb_read64(counter + OFF_PAGE_COUNTER_PARENT) : 0;
	}
	return least / TB_SHARE;
}

/* The kernel's memory for TCP is over its second mark (net.ipv4.tcp_mem), and was not below the
 * first one since: from here on a redirect may fail with ENOMEM, which no TCP send does. */
static __always_inline int tb_is_under_pressure(__u64 prot)
{
	__u64 pressure = tb_read64(prot + OFF_PROTO_MEMORY_PRESSURE);

	return pressure && tb_read64(pressure);
}

/* It is over the first one: receive buffers do not grow (tcp_clamp_window), as RULE (bound)
 * expects.
 */
static __always_inline int tb_is_memory_short(__u64 prot)
{
	__s64 pages = tb_read64(tb_read64(prot + OFF_PROTO_MEMORY_ALLOCATED)); /* or less than 0 */
	__s64 mark = tb_read64(tb_read64(prot + OFF_PROTO_SYSCTL_MEM));

	return pages >= mark;
}

/* Returns why this message would leave the peer too much unread, TB_REASON_NONE if it would not.
 * `queued` is never less than what is unread: it counts from the last empty queue. Small amounts
 * are not looked at. */
static __always_inline __u32 tb_check_room(struct tb_conn *conn, __u32 size)
{
	__u32 unread = conn->queued + tb_cost(size);

	if (tb_is_memory_short(conn->there.prot))
		return TB_REASON_MEMORY;
	if (unread <= TB_LOOK)
		return TB_REASON_NONE;
	if (conn->queued && tb_is_empty(conn->there.psock)) {
		conn->queued = 0;
		unread = tb_cost(size);
	}
	if (unread > tb_bound(&conn->peer))
		return TB_REASON_BACKLOG;
	if (unread > tb_room(conn->peer.sk))
		return TB_REASON_MEMORY;
	return TB_REASON_NONE;
}
