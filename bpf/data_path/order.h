/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * One message: by TCP, or redirected to the peer's socket.
 *
 * RULE (one queue). A receiver reads bypassed bytes before those in its TCP queue. So a
 * direction changes its path, either way, only while the path that it leaves is empty:
 *   - to the bypass when the peer has consumed every byte sent by TCP (its copied_seq is the own
 *     write_seq), and no thread sleeps in recv there: that one would not wake for bypassed bytes;
 *   - to TCP when no bypassed byte lies unread at the peer and no redirect is on its way to it.
 * A reason for TCP waits for that moment. RULE (bound), RULE (memory), RULE (urgent), RULE (Nagle),
 * RULE (leaving) and, between two pods, RULE (lock) do not. Then TCP bytes lie behind bypassed
 * ones, still in order, and the sender notes it: edge.h. FIN needs no rule, since a reader meets it
 * last.
 *
 * RULE (lock). A redirect takes the peer's socket lock in process context and waits for it in a
 * sleep that no signal ends. An application may hold it for long (throttled, swapping), and over
 * TCP the sender would not notice. So a message to an application goes by TCP while a thread owns
 * that lock. Sidecars do not hold it for long.
 *
 * RULE (half-closed). Conntrack forgets half-closed connections in a minute or two, unless it sees
 * packets. After the first FIN bytes go by TCP, from the next moment on that RULE (one queue)
 * allows.
 *
 * RULE (conntrack). It forgets established ones after days, or as the node has set. So one
 * message in a second goes by TCP, if one is sent and RULE (one queue) allows.
 */

/* A run of so much without an answer is a stream, which goes by TCP until it is answered: so that
 * it has left the bypass before its reader rests. */
#define TB_STREAM (256 * 1024)
/* In the sockhash a message by TCP costs more than outside. So a member has a credit for such
 * messages, in units of tb_cost(), and leaves when it is used up. Bypassed exchanges add to it. */
#define TB_FIRST_CREDIT (1 << 20)
#define TB_MOST_CREDIT (2 << 20)
#define TB_EXCHANGE_CREDIT 2048
/* After so many messages by the bypass it was worth it to join: the passes, and a TCP that starts
 * as after a pause. */
#define TB_WORTH_IT 16384
/* So many bytes the kernel can put into one piece at any time (PAGE_ALLOC_COSTLY_ORDER). */
#define TB_ONE_PIECE (32 * 1024)

/* Has the peer left the sockhash since this direction went to the bypass? Another sk_prot shows
 * that it closes, or has a ULP. Its queue may be freed memory by now, so it is not waited for. */
static __always_inline int tb_is_gone(const struct tb_conn *conn, __u32 state)
{
	return state / TB_MEMBERSHIPS > conn->peer_state / TB_MEMBERSHIPS + 1 ||
	       tb_membership(state) == TB_OUT ||
	       tb_read64(conn->peer.sk + OFF_SOCK_PROT) != conn->there.prot;
}

/* RULE (conntrack). An end without TCP_NODELAY has read all first: the answer that acknowledges its
 * message then lies behind no bypassed one. */
static __always_inline int tb_is_refresh_due(const struct tb_conn *conn, __u64 now)
{
	return tb_has_passed(NS_PER_S, conn->tcp_at, now) &&
	       (tb_has_nodelay(conn->me.sk) || tb_is_empty(conn->at.psock));
}

/* Why this message should go by TCP as soon as it may; TB_REASON_NONE: it need not. `state` is the
 * peer's. */
static __always_inline __u32 tb_wish(const struct tb_conn *conn, const void *tp, __u32 state,
				     __u64 now)
{
	if (!conn->there.psock)
		return TB_REASON_WAITING; /* the peer has never joined */
	/* First: only this reason lets tb_try_return() stop waiting for a peer that has gone. */
	if (state != conn->peer_state || tb_membership(conn->state) != TB_MEMBER ||
	    tb_read64(conn->peer.sk + OFF_SOCK_PROT) != conn->there.prot)
		return TB_REASON_LEAVING;
	if (!tb_is_nonblocking(conn->there.file))
		return TB_REASON_BLOCKING; /* it leaves, paused or not */
	if (tb_is_paused(conn))
		return TB_REASON_PAUSED;
	if (TB_OWN(__u8, tp, OFF_SOCK_STATE) != BPF_TCP_ESTABLISHED ||
	    tb_tcp_state(conn->peer.sk) != BPF_TCP_ESTABLISHED)
		return TB_REASON_HALF_CLOSED;
	/* An application's lock, RULE (lock). */
	if (!conn->peer.is_proxy && tb_is_owned(conn->peer.sk))
		return TB_REASON_BUSY;
	/* Only TCP can hold back what TCP_CORK holds back. */
	if (TB_OWN(__u8, tp, OFF_TCP_SOCK_NONAGLE) & MASK_TCP_NAGLE_CORK)
		return TB_REASON_CORKED;
	if (TB_OWN(__u64, tp, OFF_ICSK_ULP_OPS) || tb_has_options(conn->peer.sk))
		return TB_REASON_INELIGIBLE;
	if (tb_is_joiner_silent(now))
		return TB_REASON_WAITING;
	if (tb_is_refresh_due(conn, now) || tb_waits_for_ack(conn->peer.sk))
		return TB_REASON_REFRESH;
	return conn->run > TB_STREAM ? TB_REASON_STREAM : TB_REASON_NONE;
}

/* May a direction that is on TCP go to the bypass with this message? */
static __always_inline int tb_may_bypass(struct tb_conn *conn, const void *tp)
{
	__u64 sk = conn->peer.sk;

	/* In this order: a reader that is about to sleep has the lock until its entry is queued. */
	return tb_read32(sk + OFF_TCP_SOCK_COPIED_SEQ) ==
		       TB_OWN(__u32, tp, OFF_TCP_SOCK_WRITE_SEQ) &&
	       !tb_is_owned(sk) && !tb_sleepers(sk) && tb_psock(sk) == conn->there.psock &&
	       tb_is_empty(conn->there.psock);
}

/* Is no other thread of this socket on its way from verdict to redirect? (The kernel lets go of the
 * socket lock between the two.) One reference is the sockhash's, one this call's, and one each
 * thread's that sleeps. */
static __always_inline int tb_is_alone(const struct tb_conn *conn)
{
	__u32 refs = tb_psock_refs(conn->at.psock);

	return refs == 2 || refs == 2 + tb_sleepers(conn->me.sk);
}

/* Takes a direction from the bypass to TCP with this message, as it wishes. Returns 0 if it must
 * stay.
 *
 * RULE (leaving). A peer that leaves gets no byte into its empty queue, also while another thread
 * is on its way there.
 *
 * RULE (Nagle). A peer that waits for an acknowledgement gets it with this message.
 *
 * RULE (lock). An application of another pod gets no bypassed byte at all while a thread holds its
 * lock: it could hold the sender up by a read of the very bytes that make its queue not empty. But
 * a reader that looks and leaves them would never see bytes behind them. */
static __always_inline int tb_try_return(struct tb_conn *conn, __u32 wish, __u32 state)
{
	int is_alone = tb_is_alone(conn); /* first: a redirect may arrive between the looks */
	int is_empty = tb_is_empty(conn->there.psock);

	if (is_empty && is_alone) {
		conn->path = TB_PATH_TCP;
		return 1;
	}
	if (tb_waits_for_ack(conn->peer.sk) ||
	    (wish == TB_REASON_LEAVING && (is_empty || tb_is_gone(conn, state))) ||
	    (wish == TB_REASON_BUSY && conn->me.pod_id != conn->peer.pod_id &&
	     tb_is_held(conn->peer.sk))) {
		conn->path = TB_PATH_BEHIND;
		return 1;
	}
	return 0;
}

/* Has the peer read on to TCP bytes, past those that were bypassed before? */
static __always_inline int tb_has_read_on(const struct tb_conn *conn)
{
	return (int)(tb_read32(conn->peer.sk + OFF_TCP_SOCK_COPIED_SEQ) - conn->tcp_seq) > 0;
}

/* Counts what the peer has answered, and what lies between its answers. */
static __always_inline void tb_note_answers(struct tb_conn *conn, __u32 size)
{
	__u32 sent;

	conn->sent++;
	conn->begun += conn->path == TB_PATH_BYPASS; /* first of all: RULE (leaving) */
	sent = TB_PEERS(__u32, conn, sent);
	if (sent == conn->peer_sent) {
		conn->run += tb_cost(size);
		return;
	}
	conn->peer_sent = sent;
	conn->run = tb_cost(size);
	if (conn->path == TB_PATH_BYPASS)
		conn->credit = tb_min(conn->credit + TB_EXCHANGE_CREDIT, TB_MOST_CREDIT);
}

/* A direction on TCP: TB_REASON_NONE if it goes to the bypass with this message, or why not. */
static __always_inline __u32 tb_go_to_bypass(struct tb_conn *conn, const void *tp, __u32 size,
					     __u32 state, __u64 now)
{
	__u32 reason;

	if (conn->path == TB_PATH_BEHIND && tb_has_read_on(conn) &&
	    tb_is_empty(conn->there.psock) && tb_is_alone(conn))
		conn->path = TB_PATH_TCP;
	/* The peer has joined. A reader that was inside recv then looks into TCP's queue only. So
	 * one more message goes by TCP, and must be consumed. */
	if (state != conn->peer_state && tb_membership(state) == TB_MEMBER) {
		conn->peer_state = state;
		conn->there.psock = TB_PEERS(__u64, conn, at.psock);
		conn->there.prot = TB_PEERS(__u64, conn, at.prot);
		conn->there.file = TB_PEERS(__u64, conn, at.file);
		return TB_REASON_ORDER;
	}
	/* It is about to leave. Besides, the peer may have an urgent byte unread: recv(MSG_OOB)
	 * would take a bypassed one. */
	if (conn->refused)
		return TB_REASON_LEAVING;
	reason = tb_wish(conn, tp, state, now);
	if (reason)
		return reason;
	if (!tb_may_bypass(conn, tp))
		return TB_REASON_ORDER;
	if (tb_bound(&conn->peer) <= TB_LOOK)
		return TB_REASON_BACKLOG;
	conn->queued = 0;
	reason = tb_check_room(conn, size);
	if (reason)
		return reason;
	conn->path = TB_PATH_BYPASS;
	conn->tcp_seq = TB_OWN(__u32, tp, OFF_TCP_SOCK_WRITE_SEQ);
	return TB_REASON_NONE;
}

/* A direction on the bypass: TB_REASON_NONE if it stays there with this message, or why not. */
static __always_inline __u32 tb_stay_on_bypass(struct tb_conn *conn, const void *tp, __u32 size,
					       __u32 state, __u64 now)
{
	__u32 reason = tb_wish(conn, tp, state, now);
	__u8 own = TB_OWN(__u8, tp, OFF_SOCK_STATE);

	/* From its own FIN on TCP refuses the message (EPIPE), but a redirect would carry it behind
	 * the end of the stream. It does not wish to stay, then. */
	if (own != BPF_TCP_ESTABLISHED && own != BPF_TCP_CLOSE_WAIT)
		return reason;
	/* A thread that was inside send before this socket joined has sent by TCP since. */
	if (conn->tcp_seq != TB_OWN(__u32, tp, OFF_TCP_SOCK_WRITE_SEQ)) {
		conn->path = TB_PATH_BEHIND;
		return TB_REASON_ORDER;
	}
	if (!reason || !tb_try_return(conn, reason, state)) {
		reason = tb_check_room(conn, size);
		if (!reason)
			return TB_REASON_NONE;
		conn->path = TB_PATH_BEHIND; /* RULE (bound): at once */
	}
	return reason;
}

/* Both ends leave: RULE (short sends), RULE (urgent), RULE (Nagle). */
static __always_inline void tb_give_up(struct tb_conn *conn, __u32 outcome)
{
	if (conn->refused)
		return;
	tb_refuse(conn, outcome);
	tb_ring(conn->me.pod_id);
	tb_ring(conn->peer.pod_id);
}

/* RULE (urgent). Why this message goes by TCP, whatever lies unread. Others that are no plain send
 * may be urgent, too. */
static __always_inline __u32 tb_send_urgently(struct tb_conn *conn, __u32 state)
{
	tb_give_up(conn, TB_OUTCOME_INELIGIBLE);
	if (conn->path == TB_PATH_BYPASS && !tb_try_return(conn, TB_REASON_INELIGIBLE, state))
		conn->path = TB_PATH_BEHIND;
	return TB_REASON_INELIGIBLE;
}

/* RULE (Nagle). A message goes by TCP, perhaps of an end without TCP_NODELAY. The kernel would push
 * each piece of it by itself (tcp_bpf_push). While paused the end may send on without answers: one
 * that must acknowledge goes by TCP, too. A ULP makes messages of its own. */
static __always_inline void tb_send_undelayed(struct sk_msg_md *msg, struct tb_conn *conn,
					      __u32 reason)
{
	int waits = reason != TB_REASON_PAUSED && tb_waits_for_ack(conn->me.sk);

	if (tb_has_nodelay(conn->me.sk) || tb_read64(conn->me.sk + OFF_ICSK_ULP_OPS))
		return;
	if (msg->size > TB_ONE_PIECE || bpf_msg_pull_data(msg, 0, msg->size, 0) || waits)
		tb_give_up(conn, TB_OUTCOME_NAGLE);
}

/* A message goes by TCP from a socket in the sockhash, where that costs more than outside. */
static __always_inline void tb_note_tcp(struct tb_conn *conn, __u32 reason, __u32 size, __u64 now)
{
	conn->tcp_at = now;
	tb_count_tcp(conn, reason, size);
	if (conn->path == TB_PATH_BEHIND)
		tb_ring_for_edge(conn->peer.pod_id);
	else if (reason == TB_REASON_BLOCKING || reason == TB_REASON_INELIGIBLE)
		tb_ring(conn->peer.pod_id); /* a pass takes the peer out */
	if (reason == TB_REASON_INELIGIBLE || tb_is_under_pressure(conn->at.prot))
		tb_ring(conn->me.pod_id); /* it may be this end */
	if (reason == TB_REASON_PAUSED)
		return;
	conn->credit -= tb_min(conn->credit, tb_cost(size));
	if (!conn->credit && reason == TB_REASON_CORKED && conn->begun < TB_WORTH_IT)
		tb_give_up(conn, TB_OUTCOME_NAGLE); /* as most of its answers go */
	else if (!conn->credit)
		tb_miss(conn->me.pod_id, 1 + size / TB_EXCHANGE_BYTES);
}

/* Redirects the message or lets it go by TCP. */
static __always_inline void tb_send(struct sk_msg_md *msg, struct tb_conn *conn, const void *tp)
{
	__u64 now = tb_tick_ns();
	int is_plain = tb_is_plain_send() && !tb_expects_notice(tp);
	__u32 reason, state;

	tb_note_answers(conn, msg->size);
	state = TB_PEERS(__u32, conn, state);
	if (!is_plain)
		reason = tb_send_urgently(conn, state);
	else if (conn->path == TB_PATH_BYPASS)
		reason = tb_stay_on_bypass(conn, tp, msg->size, state, now);
	else
		reason = tb_go_to_bypass(conn, tp, msg->size, state, now);
	/* RULE (identity), RULE (reads). The id is found only for the very same connection. */
	if (!reason && sockhash.msg_redirect_hash(msg, &conn->peer.id, BPF_F_INGRESS) != SK_PASS) {
		conn->path = TB_PATH_TCP;
		reason = TB_REASON_LEAVING;
	}
	*(volatile __u32 *)&conn->decided = conn->sent; /* behind the rest */
	if (reason) {
		tb_send_undelayed(msg, conn, reason);
		return tb_note_tcp(conn, reason, msg->size, now);
	}
	conn->queued += tb_cost(msg->size);
	tb_count_bypassed(conn, msg->size, now);
}
