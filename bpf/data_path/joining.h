/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Joining the sockhash, and leaving it.
 *
 * A pass visits the open files of a pod's processes: an iterator over the files of one process
 * (bpf_iter/task_file, Linux 6.1). The iterator holds a reference to the file, so the socket cannot
 * be closed during a visit, and accept(2) is over. It does not hold the socket's lock. So a
 * callback may write the same members meanwhile, and a visit looks again at what must hold: at the
 * id and `refused` after a join, at the psock in each later visit.
 *
 * RULE (joining). A socket joins when it is known: accepted, as it is read, with bytes sent there
 * and back, and no thread inside a call on it. What RULE (readers) and RULE (identity) ask is
 * asked anew, and once more after it has joined what another thread may have changed.
 *
 * RULE (leaving). What lies unread in a removed socket's bypass queue is lost, and a redirect to it
 * on its way fails. What it has bypassed itself must have been read, too: else its next bytes, by
 * TCP, lie behind that, and edge.h does not see it. So a socket leaves in three visits, some time
 * apart:
 *   1. The first writes TB_LEAVING. Sends at both ends that begin from then on see it, and bypass
 *      no byte into an empty queue.
 *   2. The second notes how many sends have begun on the bypass, and then finds both ends at rest:
 *      none of their redirects is on its way. An end with TB_PATH_TCP is: it came there when none
 *      was. At any other no thread is inside a call: its psock has the sockhash's reference alone,
 *      and those of sleepers.
 *   3. The third finds both queues empty, again both ends at rest, and then the same number.
 *      So no redirect is on its way, none has begun since 2, and none can begin. If the number
 *      has changed, 2 is next, else 3 again.
 */

/* How long a member waits for its peer to join: longer than the joiner puts a pass off. */
#define TB_LONELY (3 * NS_PER_S)
#define TB_FILES 256 /* visited in about 60 microseconds */

static __always_inline int tb_may_join(const struct tb_conn *conn, __u64 sk, __u64 now)
{
	return tb_is_known(conn, now) && tb_is_peer_known(conn) && !tb_is_paused(conn) &&
	       !tb_is_joiner_silent(now) && !tb_is_under_pressure(tb_read64(sk + OFF_SOCK_PROT)) &&
	       tb_tcp_state(sk) == BPF_TCP_ESTABLISHED &&
	       tb_tcp_state(conn->peer.sk) == BPF_TCP_ESTABLISHED && !tb_is_owned(sk) &&
	       !tb_sleepers(sk) && tb_is_same_connection(conn, sk);
}

/* `socket` lies at `sk`, and had the id before it was looked at. */
static __always_inline void tb_join(struct tb_conn *conn, void *socket, __u64 sk, __u64 id,
				    __u64 now)
{
	__u32 out;

	/* Another program's sockmap has it already: the kernel would let both. Or it has left, and
	 * a call that began before still holds its former psock. */
	if (tb_read64(sk + OFF_SOCK_USER_DATA)) {
		if (tb_psock(sk) != conn->at.psock)
			tb_refuse(conn, TB_OUTCOME_BUSY);
		return;
	}
	if (conn->path == TB_PATH_BYPASS) /* when it left: TB_PATH_BEHIND stays true */
		conn->path = TB_PATH_TCP;
	conn->begun = 0;
	conn->credit = TB_FIRST_CREDIT;
	conn->tcp_at = now;
	conn->at.psock = TB_JOINING;
	if (sockhash.update(&id, socket)) {
		conn->at.psock = 0;
		tb_start_over(conn); /* the map is full, or memory short */
		tb_count_outcome(conn->me.pod_id, tb_hop(conn), TB_OUTCOME_FULL);
		return;
	}
	tb_order_looks();
	/* The socket was used again (tb_use_again()), or has spliced just now: RULE (splice). Or a
	 * callback has just found it not to be known after all. */
	if (conn->me.id != id || tb_has_spliced(conn) || !tb_is_known(conn, now)) {
		conn->at.psock = tb_psock(sk); /* a call may hold it, still */
		sockhash.delete(&id);
		return;
	}
	out = tb_moved_out(conn, tb_sent(sk));
	if ((int)out > 0) /* an exchange under way; no callback has just counted it */
		tb_count_tcp(conn, TB_REASON_WAITING, out);
	conn->at.psock = tb_psock(sk);
	conn->at.prot = tb_read64(sk + OFF_SOCK_PROT);
	conn->at.file = tb_file(sk);
	tb_set_membership(conn, TB_MEMBER, now);
	if (conn->me.id != id) { /* used again just now */
		sockhash.delete(&id);
		tb_set_membership(conn, TB_OUT, now);
		return;
	}
	tb_count_membership(conn, 1);
	/* By a callback just now, which may also have found that the connection ended. */
	if (conn->refused || tb_tcp_state(sk) != BPF_TCP_ESTABLISHED)
		tb_ring(conn->me.pod_id);
	if (conn->peer.pod_id != conn->me.pod_id &&
	    tb_membership(TB_PEERS(__u32, conn, state)) == TB_OUT)
		tb_ring(conn->peer.pod_id);
}

/* Must a member leave, or does it gain nothing? Past the kernel's last mark for TCP's memory a send
 * of a member gets EAGAIN, and no new edge follows when there is memory again: a socket in a
 * sockhash is not told, one of TCP is (tcp_sendmsg_locked). */
static __always_inline int tb_is_to_leave(const struct tb_conn *conn, __u64 now)
{
	int is_lone =
		!tb_has_peer(conn) || tb_membership(TB_PEERS(__u32, conn, state)) != TB_MEMBER;

	return conn->refused || !conn->credit || (tb_control_flags() & TB_CONTROL_LEAVE) ||
	       tb_is_under_pressure(conn->at.prot) || tb_tcp_state(conn->me.sk) == BPF_TCP_CLOSE ||
	       (is_lone && (!tb_is_peer_known(conn) || tb_has_passed(TB_LONELY, conn->since, now)));
}

/* Is no thread inside a call on this socket, but for those that sleep? None of these is on its way
 * to a redirect: such a thread does not sleep in the socket's own queue. But one may sleep in recv
 * without a reference, and is then taken for another one, on its way. So where a thread sleeps, the
 * steps of leaving are passes apart. */
static __always_inline int tb_is_unused(__u64 sk, __u64 psock)
{
	__u32 sleepers = tb_sleepers(sk), refs = tb_psock_refs(psock);

	return refs == 1 || (refs == 1 + sleepers && tb_sleepers(sk) == sleepers);
}

/* Is no redirect of this end's on its way, by its struct tb_conn? One is being decided upon while
 * `sent` is ahead of `decided`. */
static __always_inline int tb_is_at_rest(__u64 conn, __u64 sk)
{
#define TB_OF_END(type, member) TB_READ(type, conn + offsetof(struct tb_conn, member))
	if (TB_OF_END(__u32, decided) != TB_OF_END(__u32, sent))
		return 0;
	if (TB_OF_END(__u32, path) == TB_PATH_TCP)
		return 1;
	return tb_is_unused(sk, TB_OF_END(__u64, at.psock));
}

/* Of neither end's? */
static __always_inline int tb_is_idle(const struct tb_conn *conn)
{
	return tb_is_at_rest(conn->me.conn, conn->me.sk) &&
	       (!tb_is_peer_in(conn) || tb_is_at_rest(conn->peer.conn, conn->peer.sk));
}

/* Do no bypassed bytes lie unread, at either end? */
static __always_inline int tb_is_drained(const struct tb_conn *conn)
{
	return tb_is_empty(conn->at.psock) &&
	       (!tb_is_peer_in(conn) || tb_is_empty(TB_PEERS(__u64, conn, at.psock)));
}

/* How many sends both ends have begun on the bypass, and whether the peer is in: once it has
 * closed, its sends are not known. Wraps; 0 is none. */
static __always_inline __u64 tb_begun(const struct tb_conn *conn)
{
	int is_in = tb_is_peer_in(conn);
	__u32 peers = is_in ? TB_PEERS(__u32, conn, begun) : 0;

	return (is_in ? 1ULL << 33 : 1) + (__u32)(*(const volatile __u32 *)&conn->begun + peers);
}

/* RULE (leaving), the second visit or the third. Returns 1 if it may leave now. The sends are
 * counted before the first look in the second, and after the last look in the third. */
static __always_inline int tb_try_leave(struct tb_conn *conn)
{
	__u64 begun = tb_begun(conn);

	if (conn->noted != begun) {
		conn->noted = tb_is_idle(conn) ? begun : 0;
		return 0;
	}
	return tb_is_drained(conn) && tb_is_idle(conn) && tb_begun(conn) == begun;
}

/*
 * RULE (ULP). A thread may have been inside setsockopt(TCP_ULP) while this socket joined, and its
 * sk_prot is the sockhash's since. To take it out then would leave it without a psock: it could not
 * be closed (sock_map_close leaks it). So it stays, on TCP, and closes as any member.
 */
static __always_inline int tb_must_stay(const struct tb_conn *conn, __u64 sk)
{
	return tb_read64(sk + OFF_ICSK_ULP_OPS) && tb_read64(sk + OFF_SOCK_PROT) == conn->at.prot;
}

static __always_inline void tb_leave(struct tb_conn *conn, __u64 now)
{
	__u64 id = conn->me.id;

	/* A thread that sleeps keeps the queue that goes now, and no later look would find it. */
	if (tb_sleepers(conn->me.sk) && !conn->refused)
		tb_refuse(conn, TB_OUTCOME_BLOCKING);
	tb_flush_tally(conn);
	sockhash.delete(&id);
	conn->moved.received = tb_read32(conn->me.sk + OFF_TCP_SOCK_RCV_NXT);
	conn->moved.sent = tb_sent(conn->me.sk);
	tb_start_over(conn);
	if (conn->begun >= TB_WORTH_IT)
		conn->wanted = TB_FIRST_WANTED;
	else if (!tb_is_under_pressure(conn->at.prot)) /* that is not its own doing */
		tb_back_off(conn);
	tb_set_membership(conn, TB_OUT, now);
	tb_count_membership(conn, 0);
	if (tb_is_peer_in(conn))
		tb_ring(conn->peer.pod_id); /* it leaves, too */
}

/* A member stays, or takes a step on its way out. Returns 1 if the next step may follow at once. */
static __always_inline int tb_visit_member(struct tb_conn *conn, __u64 sk, __u64 now)
{
	__u32 outcome = conn->refused ? 0 : tb_reason_to_refuse(conn, sk);
	int is_first = tb_membership(conn->state) != TB_LEAVING;

	if (outcome)
		tb_refuse(conn, outcome);
	if (tb_must_stay(conn, sk))
		return 0;
	if (!conn->at.psock || tb_psock(sk) != conn->at.psock) { /* a callback has taken it out */
		tb_set_membership(conn, TB_OUT, now);
		return 0;
	}
	if (is_first && !tb_is_to_leave(conn, now))
		return 0;
	if (is_first) {
		conn->noted = 0;
		tb_set_membership(conn, TB_LEAVING, now);
	} else if (tb_try_leave(conn)) {
		tb_leave(conn, now);
		return 0;
	}
	tb_ring(conn->me.pod_id); /* for the next step, if it does not */
	return (is_first || conn->noted) && !tb_sleepers(conn->me.sk) &&
	       !tb_sleepers(conn->peer.sk);
}

/* `socket` lies at `sk`. */
static __always_inline void tb_visit_outsider(struct tb_conn *conn, void *socket, __u64 sk,
					      __u64 id, __u64 now)
{
	__u32 outcome;

	/* The peer has read on: no byte lies behind others any more. A member's sends see that. */
	if (conn->path == TB_PATH_BEHIND && tb_has_peer(conn) && tb_has_read_on(conn))
		conn->path = TB_PATH_TCP;
	if (conn->refused || !tb_may_join(conn, sk, now))
		return;
	outcome = tb_reason_to_refuse(conn, sk);
	if (outcome)
		tb_refuse(conn, outcome);
	else
		tb_join(conn, socket, sk, id, now);
}

/* The kernel releases a file that is closed during its visit when the visitor's read(2) returns.
 * Until then no FIN goes out, and epoll keeps the file. So the read returns every TB_FILES files.
 * `meta` is a struct bpf_iter_meta. */
static __always_inline void tb_end_read(void *meta)
{
	__u64 number = *(volatile __u64 *)(meta + 2 * sizeof(__u64)); /* seq_num */
	__u32 none = TB_NO_FILE;

	if (number % TB_FILES == TB_FILES - 1)
		bpf_seq_write(*(void *volatile *)meta, &none, sizeof(none));
}

/* The TCP socket at `sk`, of an open file; `socket` is its verified pointer. Returns enum tb_needs.
 */
static __always_inline int tb_visit(void *socket, __u64 sk)
{
	struct tb_conn *conn = conns.sk_storage_get(socket, 0, 0);
	__u64 now = bpf_ktime_get_ns(), id = conn ? *(volatile __u64 *)&conn->me.id : 0;
	int may_be_behind, found = 0;

	if (!conn || !id)
		return 0;
	may_be_behind = tb_may_be_behind(conn); /* as a member it may still know */
	if (tb_membership(conn->state) == TB_OUT)
		tb_visit_outsider(conn, socket, sk, id, now);
	else if (tb_visit_member(conn, sk, now))
		found |= TB_NEEDS_VISIT;
	if (may_be_behind && tb_find_edge(conn, sk)) {
		found |= TB_NEEDS_EDGE;
		/* The socket has left and its peer has closed: this edge is its last one. */
		if (tb_membership(conn->state) == TB_OUT && !tb_has_peer(conn))
			conn->at.psock = 0;
	}
	return found;
}
