/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * When a connection is known well enough to join, by the callbacks of its two sockets.
 *
 * Most connections gain nothing by joining: they are short, or streams, or read in a way that keeps
 * them out. So first a socket calls per round trip, and its exchanges are counted: bytes that went
 * there and back. When both ends have made so many as they want, each packet is looked at for some
 * exchanges more. Then both are known, and the pod of each is told what they miss.
 */

/* One that left joins again after so many times as many exchanges as the last time. */
#define TB_BACK_OFF 4
#define TB_MAX_WANTED 65536
/* An exchange of so many bytes goes by TCP for the most part: TB_STREAM. A socket that makes many
 * would join and leave again. So one while it is watched makes it back off. Once it wants so many
 * exchanges and begins with another one, it stays on TCP: its calls would cost more than it can
 * gain. */
#define TB_LARGE_EXCHANGE (512 * 1024)
#define TB_UNDER_WAY 1 /* the first one watched may have been: it is measured in part */
#define TB_WANTED_TO_STAY (TB_BACK_OFF * TB_BACK_OFF * TB_BACK_OFF * TB_FIRST_WANTED)

/* What its peer was refused for. */
static __always_inline __u32 tb_peers_refusal(const struct tb_conn *conn)
{
	return tb_has_peer(conn) ? TB_PEERS(__u32, conn, refused) : 0;
}

/* Why this socket must stay out of the sockhash for good. */
static __always_inline __u32 tb_reason_to_refuse(const struct tb_conn *conn, __u64 sk)
{
	__u32 outcome = tb_unfit(sk);

	if (outcome)
		return outcome;
	if (tb_has_spliced(conn))
		return TB_OUTCOME_SPLICE;
	if (!tb_has_nodelay(sk) && tb_has_peer(conn) && !tb_has_nodelay(conn->peer.sk))
		return TB_OUTCOME_NAGLE;
	return tb_peers_refusal(conn);
}

/* How far its TCP has sent, without the FIN, which write_seq counts. */
static __always_inline __u32 tb_sent(__u64 sk)
{
	__u32 state = tb_tcp_state(sk);

	return tb_read32(sk + OFF_TCP_SOCK_WRITE_SEQ) -
	       (state != BPF_TCP_ESTABLISHED && state != BPF_TCP_CLOSE_WAIT);
}

/* What it has exchanged so far does not count any more. */
static __always_inline void tb_start_over(struct tb_conn *conn)
{
	conn->exchanges = 0;
	conn->watched = 0;
}

static __always_inline void tb_back_off(struct tb_conn *conn)
{
	tb_start_over(conn);
	conn->wanted = tb_min(TB_BACK_OFF * conn->wanted, TB_MAX_WANTED);
}

/* Bytes sent since its last exchange. While the own FIN is made, tb_sent() is one less. */
static __always_inline __u32 tb_moved_out(const struct tb_conn *conn, __u32 sent)
{
	__u32 out = sent - conn->moved.sent;

	return out == ~0U ? 0 : out;
}

/* Counts an exchange if bytes went there and back since the last one. Returns its weight, 0 for
 * none. */
static __always_inline __u32 tb_note_exchange(struct tb_conn *conn, __u32 received, __u32 sent)
{
	__u32 in = received - conn->moved.received, out = tb_moved_out(conn, sent);

	if (!in || !out)
		return 0;
	if (tb_is_paired(conn))
		tb_count_tcp(conn, TB_REASON_WAITING, out);
	conn->moved.received = received;
	conn->moved.sent = sent;
	conn->exchanges++;
	return 1 + (in + out) / TB_EXCHANGE_BYTES;
}

/* Is each packet that it sends to be looked at, as each of its peer's? Until then it calls per
 * round trip: a stream that is not answered never calls per packet. */
static __always_inline int tb_is_to_watch(const struct tb_conn *conn, __u64 now)
{
	return conn->exchanges >= conn->wanted && tb_has_passed(TB_MIN_AGE, conn->since, now) &&
	       tb_has_peer(conn) &&
	       (TB_PEERS(__u32, conn, exchanges) >= TB_PEERS(__u32, conn, wanted) ||
		tb_membership(TB_PEERS(__u32, conn, state)) == TB_MEMBER);
}

/* Has it been watched for long enough, with the exchange that may be under way? */
static __always_inline int tb_was_watched(const struct tb_conn *conn)
{
	__u32 received = tb_read32(conn->me.sk + OFF_TCP_SOCK_RCV_NXT);
	__u32 sent = tb_read32(conn->me.sk + OFF_TCP_SOCK_WRITE_SEQ);
	__u32 more = received != conn->moved.received && sent != conn->moved.sent;

	return conn->watched + more >= TB_MIN_EXCHANGES;
}

/* Is it known well enough to join? */
static __always_inline int tb_is_known(const struct tb_conn *conn, __u64 now)
{
	return tb_is_to_watch(conn, now) && tb_was_watched(conn);
}

/* Is its peer, too, with the exchange under way, or in already? The two join together: a member
 * alone only pays, and leaves again while the peer is on its way in. */
static __always_inline int tb_is_peer_known(const struct tb_conn *conn)
{
	__u32 membership = tb_membership(TB_PEERS(__u32, conn, state));

	return tb_has_peer(conn) &&
	       (membership == TB_MEMBER ||
		(membership == TB_OUT && TB_PEERS(__u32, conn, watched) + 1 >= TB_MIN_EXCHANGES));
}

/* A round trip of a connection that is far from joining. Each end looks for the other one. */
static __always_inline void tb_complete_round_trip(struct bpf_sock_ops *skops,
						   const struct tb_pod *pod)
{
	struct tb_conn *conn;
	__u32 outcome;

	if (skops->state != BPF_TCP_ESTABLISHED || skops->segs_in < TB_MIN_SEGMENTS)
		return;
	conn = tb_conn_of(skops);
	/* It has joined while a callback took it out of those to watch. */
	if (conn && conn->me.id && tb_membership(conn->state) != TB_OUT)
		return tb_call(skops, TB_CALL_PER_PACKET);
	if (!conn || !conn->me.id)
		conn = tb_meet(skops, pod);
	if (!conn)
		return;
	if (!conn->refused && conn->me.is_client)
		tb_seek(conn);
	else if (!conn->refused && !tb_is_paired(conn))
		tb_find_client(skops, pod, conn);
	tb_note_exchange(conn, skops->rcv_nxt, tb_sent(conn->me.sk));
	outcome = tb_peers_refusal(conn);
	if (!tb_has_peer(conn) && conn->exchanges > conn->wanted + TB_SEEKING &&
	    (!(skops->bpf_sock_ops_cb_flags & TB_OLDER) ||
	     tb_has_passed(TB_SEEKING_NS, conn->since, tb_tick_ns()))) {
		if (conn->me.is_client && !tb_is_paired(conn))
			halves.delete(&conn->half);
		outcome = TB_OUTCOME_NO_PEER; /* or the peer has not found this end */
	}
	if (outcome && !conn->refused)
		tb_refuse(conn, outcome);
	if (conn->refused)
		tb_call(skops, TB_CALL_NEVER);
	else if (tb_is_to_watch(conn, tb_tick_ns()))
		tb_call(skops, TB_CALL_PER_PACKET);
}

/* A paired socket that is not in the sockhash sends a packet. */
static __always_inline void tb_wait_to_join(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	__u64 sk = conn->me.sk;
	__u32 sent = tb_sent(sk), weight, outcome;
	__u32 in = skops->rcv_nxt - conn->moved.received;
	int is_large = in + tb_moved_out(conn, sent) >= TB_LARGE_EXCHANGE;

	outcome = conn->refused ? conn->refused : tb_reason_to_refuse(conn, sk);
	weight = tb_note_exchange(conn, skops->rcv_nxt, sent);
	/* Not watched yet: it may be the rest of an answer in the midst of which it has left. */
	if (!is_large || !tb_is_to_watch(conn, tb_tick_ns()))
		conn->watched += weight != 0;
	else if (conn->watched >= TB_MIN_EXCHANGES)
		tb_start_over(conn); /* it only waits for a pass: most of its exchanges are not */
	else if (!outcome && conn->watched <= TB_UNDER_WAY && conn->wanted >= TB_WANTED_TO_STAY)
		outcome = TB_OUTCOME_STREAM;
	else
		tb_back_off(conn);
	/* Each send asks for the MSS under the lock, and this program is called (tcp_current_mss).
	 * So the current thread is the sender, or a reader that acknowledges. */
	if (!outcome && tb_is_owned(sk) && !tb_is_plain_send())
		outcome = TB_OUTCOME_INELIGIBLE;
	if (outcome && !conn->refused)
		tb_refuse(conn, outcome);
	if (outcome)
		return tb_call(skops, TB_CALL_NEVER);
	if (!tb_is_to_watch(conn, tb_tick_ns())) {
		conn->watched = 0; /* RULE (readers): what follows is not looked at */
		return tb_call(skops, TB_CALL_PER_ROUND_TRIP);
	}
	if (weight && tb_was_watched(conn) && tb_is_peer_known(conn) && !tb_is_paused(conn))
		tb_miss(conn->me.pod_id, weight);
}
