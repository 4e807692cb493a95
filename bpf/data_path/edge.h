/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Fresh edges.
 *
 * RULE (edges). While bypassed and TCP bytes both lie unread, recv returns the bypassed ones only.
 * epoll(7) lets an edge-triggered reader take such a short read for the end, and no edge may
 * follow. So while a sender notes that its TCP bytes may lie behind bypassed ones (TB_PATH_BEHIND),
 * passes visit the reader. Once it has read what was bypassed, the pass makes a new edge: it writes
 * SO_RCVLOWAT's own value back, which runs tcp_data_ready() (tcp_set_rcvlowat). That is done from
 * user space (install/program/passes.py). A packet from the reader would carry its new window to a
 * sender that drops it.
 */

/* A member sends a packet. What a thread sends that has been inside send since before the socket
 * joined goes by TCP, without a verdict. A FIN needs no edge. */
static __always_inline void tb_note_unasked(struct tb_conn *conn, __u32 tcp_state)
{
	if (conn->path != TB_PATH_BYPASS ||
	    (tcp_state != BPF_TCP_ESTABLISHED && tcp_state != BPF_TCP_CLOSE_WAIT) ||
	    tb_read32(conn->me.sk + OFF_TCP_SOCK_WRITE_SEQ) == conn->tcp_seq)
		return;
	conn->path = TB_PATH_BEHIND;
	tb_ring_for_edge(conn->peer.pod_id);
}

/* May the peer's TCP bytes lie behind bypassed ones? A peer that has closed does not say, nor does
 * this end's membership: it may have left while an edge was owed. */
static __always_inline int tb_may_be_behind(const struct tb_conn *conn)
{
	if (tb_has_peer(conn))
		return TB_PEERS(__u32, conn, path) == TB_PATH_BEHIND;
	return conn->at.psock != 0;
}

/* TCP bytes may lie behind bypassed ones. Returns 1 if this reader needs a new edge now. Not while
 * a thread owns its lock: the pass would wait. If an edge would be too early, asks for another
 * visit. */
static __always_inline int tb_find_edge(const struct tb_conn *conn, __u64 sk)
{
	/* In this order: a thread lets go of its queue after its redirect has arrived. */
	int may_come = tb_is_peer_in(conn) && tb_psock_refs(TB_PEERS(__u64, conn, at.psock)) > 1;
	int is_out = tb_membership(conn->state) == TB_OUT || tb_psock(sk) != conn->at.psock;
	int is_empty = is_out || tb_is_empty(conn->at.psock);
	__u32 copied = tb_read32(sk + OFF_TCP_SOCK_COPIED_SEQ);
	__u32 unread = tb_read32(sk + OFF_TCP_SOCK_RCV_NXT) - copied;
	/* A FIN counts, which needs no edge. */
	int is_done = (tb_read64(sk + OFF_SOCK_FLAGS) & (1ULL << BIT_SOCK_DONE)) != 0;
	int has_more = unread > is_done, is_owned = tb_is_owned(sk);

	if (!is_empty || may_come || (has_more && is_owned))
		tb_ring_for_edge(conn->me.pod_id);
	return is_empty && has_more && !is_owned;
}
