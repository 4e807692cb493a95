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

/* The reader sends a packet. It may have left since its short read. */
static __always_inline void tb_refresh_edge(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	int is_behind = TB_PEERS(__u32, conn, is_behind), lowat;

	if (is_behind && tb_membership(conn->state) != TB_OUT && !tb_is_empty(conn->at.psock))
		return tb_probe(skops, conn);
	tb_end_probes(skops, conn);
	if (!is_behind || tb_read32(conn->me.sk + OFF_TCP_SOCK_COPIED_SEQ) == skops->rcv_nxt)
		return;
	lowat = tb_read32(conn->me.sk + OFF_SOCK_RCVLOWAT);
	bpf_setsockopt(skops, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof(lowat));
}
