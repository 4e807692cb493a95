/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Fresh edges.
 *
 * RULE (edges). While bypassed and TCP bytes both lie unread, recv returns the bypassed ones only.
 * epoll(7) lets an edge-triggered reader take such a short read for the end, and no edge may follow.
 * So once the reader has read what was bypassed, its own callback makes a new edge: writing
 * SO_RCVLOWAT's own value back runs tcp_data_ready() (tcp_set_rcvlowat, Linux 6.1).
 *
 * The callback comes with each packet that the reader sends. A sender with more to send probes the
 * full window. For one without, the reader's keepalive is set to a second meanwhile, and then back.
 */

/* Longer than sooner probes are worth. */
#define TB_PROBE_S 1

static __always_inline void tb_probe(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	int seconds = 0, probe = TB_PROBE_S, on = 1;

	if (conn->own.idle_s)
		return;
	bpf_getsockopt(skops, SOL_TCP, TCP_KEEPIDLE, &seconds, sizeof(seconds));
	conn->own.is_on = (tb_read64(conn->me.sk + OFF_SOCK_FLAGS) >> BIT_SOCK_KEEPOPEN) & 1;
	conn->own.idle_s = seconds;
	bpf_setsockopt(skops, SOL_TCP, TCP_KEEPIDLE, &probe, sizeof(probe));
	bpf_setsockopt(skops, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
}

static __always_inline void tb_end_probes(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	int seconds = conn->own.idle_s, off = 0;

	if (!seconds)
		return;
	bpf_setsockopt(skops, SOL_TCP, TCP_KEEPIDLE, &seconds, sizeof(seconds));
	if (!conn->own.is_on)
		bpf_setsockopt(skops, SOL_SOCKET, SO_KEEPALIVE, &off, sizeof(off));
	conn->own.idle_s = 0;
}

/*
 * The reader sends a packet: are bytes by TCP unread behind bypassed ones, which it has read? The
 * sender counts how often that came about, and `edged` is the last of them that is over. It may
 * have left the sockhash meanwhile, with an empty queue.
 */
static __always_inline void tb_refresh_edge(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	int lowat = tb_read32(conn->me.sk + OFF_SOCK_RCVLOWAT);
	__u32 behind = TB_PEERS(__u32, conn, behind);

	if (behind == conn->edged)
		return;
	if (tb_membership(conn->state) != TB_OUT && !tb_is_empty(conn->at.psock)) {
		tb_probe(skops, conn);
		return;
	}
	if (tb_read32(conn->me.sk + OFF_TCP_SOCK_COPIED_SEQ) == skops->rcv_nxt ||
	    tb_tcp_state(conn->me.sk) != BPF_TCP_ESTABLISHED) {
		conn->edged = behind;
		tb_end_probes(skops, conn);
		return;
	}
	tb_probe(skops, conn);
	bpf_setsockopt(skops, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof(lowat));
}
