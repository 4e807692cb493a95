/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Joining the sockhash, and leaving it.
 *
 * RULE (lock of a visit). An iterator over TCP sockets holds the visited socket's lock (lock_sock)
 * from Linux 6.5, 6.4.7 and 6.1.42 on. So no thread is inside a call on it, and it cannot close. On
 * older kernels a visit holds another lock, and an update of the sockhash hangs the CPU. The loader
 * tries the kernel before it loads this program (bpf/lock_probe.c), and each visit looks again.
 *
 * RULE (joining). A socket joins when it is known: accepted, as it is read, with bytes sent there
 * and back. Everything that RULE (readers) and RULE (identity) ask is asked anew.
 *
 * RULE (leaving). What lies unread in a removed socket's bypass queue is lost, and a redirect to it
 * on its way fails. So a socket leaves in a visit when
 *   1. an earlier visit has written TB_LEAVING; the peer's sends see it, and bypass nothing into an
 *      empty queue any more;
 *   2. no thread is inside a call at the peer: its psock has the sockhash's reference alone;
 *   3. none is inside a call here;
 *   4. the queue is empty. The visit holds the lock, so nothing was read during it: the queue was
 *      empty at 2 as well, and no later send bypasses into it.
 */

/* So long after the handshake, at least, it may join. */
#define TB_MIN_AGE (TB_MIN_AGE_MS * 1000000ULL)
/* How long a member waits for its peer to join, and how long between 1 and the rest above. */
#define TB_LONELY NS_PER_S
#define TB_SEEN 1000000ULL
#define TB_MAX_WANTED 65536

static __always_inline void tb_refuse(struct tb_conn *conn, __u32 outcome)
{
	conn->refused = outcome;
	tb_count_outcome(conn->me.pod_id, conn->hop, outcome);
}

/* Is the peer's struct tb_conn still that of the peer? */
static __always_inline int tb_has_peer(const struct tb_conn *conn)
{
	return TB_PEERS(__u64, conn, me.id) == conn->peer.id;
}

/* Why this socket must stay out of the sockhash for good; also what its peer was refused for. */
static __always_inline __u32 tb_reason_to_refuse(const struct tb_conn *conn, __u64 sk)
{
	__u32 outcome = tb_unfit(sk);

	if (outcome)
		return outcome;
	return tb_has_peer(conn) ? TB_PEERS(__u32, conn, refused) : 0;
}

/* ---- Before it joins: the socket's own callbacks ---- */

/* Counts an exchange if bytes went there and back since the last one. Returns its weight, 0 for
 * none. */
static __always_inline __u32 tb_note_exchange(struct tb_conn *conn, __u32 received, __u32 sent)
{
	__u32 in = received - conn->moved.received, out = sent - conn->moved.sent;

	if (!in || !out)
		return 0;
	tb_count_tcp(conn, TB_REASON_WAITING, out);
	conn->moved.received = received;
	conn->moved.sent = sent;
	conn->exchanges++;
	return 1 + (in + out) / TB_EXCHANGE_BYTES;
}

static __always_inline int tb_is_known(const struct tb_conn *conn, __u64 now)
{
	return tb_is_paired(conn) && conn->exchanges >= conn->wanted &&
	       tb_has_passed(TB_MIN_AGE, conn->since, now);
}

/* A paired socket that is not in the sockhash sends a packet. */
static __always_inline void tb_wait_to_join(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	__u64 sk = conn->me.sk;
	__u32 sent = tb_read32(sk + OFF_TCP_SOCK_WRITE_SEQ), weight, outcome;
	__u32 first = conn->me.is_client ? conn->half.client_isn : conn->half.server_isn;

	/* An application may still be setting its socket up: before its first byte this is no sign. */
	if (sent == first)
		return;
	if (!tb_is_paired(conn))
		tb_seek(conn);
	weight = tb_note_exchange(conn, skops->rcv_nxt, sent);
	if (!tb_is_paired(conn)) {
		if (conn->exchanges > TB_SEEKING)
			tb_call_for_packets(skops, 0);
		return;
	}
	outcome = conn->refused ? conn->refused : tb_unfit(sk);
	if (outcome) {
		if (!conn->refused)
			tb_refuse(conn, outcome);
		tb_call_for_packets(skops, 0);
		return;
	}
	if (!weight || !tb_is_known(conn, tb_tick_ns()) || tb_is_paused(conn))
		return;
	tb_call_for_its_end(skops);
	tb_miss(conn->me.pod_id, weight);
}

/* ---- Visits ---- */

static __always_inline int tb_may_join(const struct tb_conn *conn, __u64 sk, __u64 now)
{
	return tb_is_known(conn, now) && !tb_is_paused(conn) && tb_file(sk) &&
	       tb_tcp_state(sk) == BPF_TCP_ESTABLISHED &&
	       tb_tcp_state(conn->peer.sk) == BPF_TCP_ESTABLISHED && tb_has_peer(conn) &&
	       !tb_has_sleeper(sk) && tb_is_same_connection(conn, sk);
}

/* `socket` lies at `sk`. */
static __always_inline void tb_join(struct tb_conn *conn, void *socket, __u64 sk, __u64 now)
{
	__u64 id = conn->me.id;

	/* Another program's sockmap has it already: the kernel would let both. */
	if (tb_read64(sk + OFF_SOCK_USER_DATA))
		return tb_refuse(conn, TB_OUTCOME_BUSY);
	if (sockhash.update(&id, socket)) {
		conn->exchanges = 0; /* the map is full, or memory short: another time */
		tb_count_outcome(conn->me.pod_id, conn->hop, TB_OUTCOME_FULL);
		return;
	}
	conn->at.psock = tb_psock(sk);
	conn->at.prot = tb_read64(sk + OFF_SOCK_PROT);
	conn->at.file = tb_file(sk);
	conn->path = TB_PATH_TCP;
	conn->wasted = 0;
	conn->tcp_at = now;
	tb_set_membership(conn, TB_MEMBER, now);
	tb_count_membership(conn, 1);
	if (conn->peer.pod_id != conn->me.pod_id && tb_membership(TB_PEERS(__u32, conn, state)) == TB_OUT)
		tb_ring(conn->peer.pod_id);
}

static __always_inline int tb_gains_nothing(const struct tb_conn *conn, __u64 now)
{
	int is_lone = !tb_has_peer(conn) || tb_membership(TB_PEERS(__u32, conn, state)) != TB_MEMBER;

	return conn->wasted > TB_WASTE || (is_lone && tb_has_passed(TB_LONELY, conn->since, now));
}

static __always_inline int tb_may_go(const struct tb_conn *conn)
{
	__u32 state = TB_PEERS(__u32, conn, state);

	if (tb_has_peer(conn) && tb_membership(state) != TB_OUT &&
	    tb_psock_refs(TB_PEERS(__u64, conn, at.psock)) > 1)
		return 0;
	return tb_psock_refs(conn->at.psock) == 1 && tb_is_empty(conn->at.psock);
}

static __always_inline void tb_leave(struct tb_conn *conn, __u64 now)
{
	__u64 id = conn->me.id;

	tb_flush_tally(conn);
	sockhash.delete(&id);
	conn->exchanges = 0;
	conn->wanted = tb_min(2 * conn->wanted, TB_MAX_WANTED);
	tb_set_membership(conn, TB_OUT, now);
	tb_count_membership(conn, 0);
}

static __always_inline void tb_visit_member(struct tb_conn *conn, __u64 sk, __u64 now)
{
	__u32 outcome = conn->refused ? 0 : tb_reason_to_refuse(conn, sk);

	if (outcome)
		tb_refuse(conn, outcome);
	if (tb_membership(conn->state) == TB_MEMBER) {
		if (!conn->refused && !tb_gains_nothing(conn, now) &&
		    !(tb_control_flags() & TB_CONTROL_LEAVE))
			return;
		tb_set_membership(conn, TB_LEAVING, now);
	} else if (tb_has_passed(TB_SEEN, conn->since, now) && tb_may_go(conn)) {
		tb_leave(conn, now);
		return;
	}
	tb_ring(conn->me.pod_id);
}

/* The socket at `sk`, which the iterator has locked; `socket` is its verified pointer. */
static __always_inline void tb_visit(void *socket, __u64 sk)
{
	struct tb_conn *conn = conns.sk_storage_get(socket, 0, 0);
	__u64 now = bpf_ktime_get_ns();
	__u32 outcome;

	if (!conn || !conn->me.id || !tb_is_owned(sk))
		return;
	if (!tb_is_paired(conn))
		tb_seek(conn);
	if (tb_membership(conn->state) != TB_OUT) {
		tb_visit_member(conn, sk, now);
		return;
	}
	if (conn->refused || !tb_may_join(conn, sk, now))
		return;
	outcome = tb_reason_to_refuse(conn, sk);
	if (outcome)
		tb_refuse(conn, outcome);
	else
		tb_join(conn, socket, sk, now);
}
