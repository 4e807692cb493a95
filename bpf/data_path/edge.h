/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Fresh edges.
 *
 * RULE (edges). While bypassed and TCP bytes both lie unread, recv returns the bypassed ones only.
 * epoll(7) lets an edge-triggered reader take such a short read for the end, and no edge may
 * follow. So while the sender notes that TCP bytes may lie behind bypassed ones (`is_behind`), and
 * TCP bytes lie unread, each packet that the reader sends makes a new edge. Writing SO_RCVLOWAT's
 * own value back runs tcp_data_ready() (tcp_set_rcvlowat, Linux 6.1).
 *
 * A reader at rest sends no packet. So its keepalive is set to a second meanwhile, and then back.
 * Not after the peer's FIN: its end of the stream is an edge, and a closed peer answers with RST.
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

/* What the application has set meanwhile stays. */
static __always_inline void tb_end_probes(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	int seconds = conn->own.idle_s, now = 0, off = 0;

	if (!seconds)
		return;
	conn->own.idle_s = 0;
	bpf_getsockopt(skops, SOL_TCP, TCP_KEEPIDLE, &now, sizeof(now));
	if (now == TB_PROBE_S)
		bpf_setsockopt(skops, SOL_TCP, TCP_KEEPIDLE, &seconds, sizeof(seconds));
	if (!conn->own.is_on)
		bpf_setsockopt(skops, SOL_SOCKET, SO_KEEPALIVE, &off, sizeof(off));
}

/* The reader sends a packet. It may have left since its short read. */
static __always_inline void tb_refresh_edge(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	int lowat;

	if (!TB_PEERS(__u32, conn, is_behind) ||
	    tb_read32(conn->me.sk + OFF_TCP_SOCK_COPIED_SEQ) == skops->rcv_nxt)
		return tb_end_probes(skops, conn);
	if (tb_tcp_state(conn->me.sk) < BPF_TCP_TIME_WAIT) /* no FIN has come */
		tb_probe(skops, conn);
	else
		tb_end_probes(skops, conn);
	lowat = tb_read32(conn->me.sk + OFF_SOCK_RCVLOWAT);
	bpf_setsockopt(skops, SOL_SOCKET, SO_RCVLOWAT, &lowat, sizeof(lowat));
}
