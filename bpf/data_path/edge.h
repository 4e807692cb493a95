/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Fresh edges.
 *
 * RULE (edges). While bypassed and TCP bytes both lie unread, recv returns the bypassed ones only.
 * epoll(7) lets an edge-triggered reader take such a short read for the end, and no edge may
 * follow. So while a sender notes that its TCP bytes may lie behind bypassed ones (`is_behind`),
 * passes visit the reader. Once it has read what was bypassed, the pass makes a new edge: it writes
 * SO_RCVLOWAT's own value back, which runs tcp_data_ready() (tcp_set_rcvlowat). That is done from
 * user space (install/passes.py). A packet of the reader's could carry its new window past a sender
 * that drops the packet.
 */

/* A visit to a reader: is it to get a new edge? Asks for another visit while it may be later. */
static __always_inline int tb_visit_reader(const struct tb_conn *conn, __u64 sk)
{
	int is_empty, has_more;

	if (!tb_has_peer(conn) || !TB_PEERS(__u32, conn, is_behind))
		return 0;
	is_empty = tb_membership(conn->state) == TB_OUT || tb_is_empty(conn->at.psock);
	has_more = tb_read32(sk + OFF_TCP_SOCK_COPIED_SEQ) != tb_read32(sk + OFF_TCP_SOCK_RCV_NXT);
	/* A thread inside a send may have a redirect on its way. */
	if (is_empty && !has_more &&
	    !(tb_is_peer_in(conn) && tb_psock_refs(TB_PEERS(__u64, conn, at.psock)) > 1))
		return 0;
	tb_ring(conn->me.pod_id);
	return is_empty && has_more;
}

/* A visit to a sender that has left: its peer has read on, so nothing lies behind any more. In the
 * sockhash its sends find that out. */
static __always_inline void tb_visit_sender(struct tb_conn *conn)
{
	if (conn->is_behind && tb_membership(conn->state) == TB_OUT && tb_has_peer(conn) &&
	    tb_has_read_on(conn))
		conn->is_behind = 0;
}
