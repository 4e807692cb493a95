/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Readers that splice.
 *
 * RULE (splice). splice(2) takes bytes from TCP's own queue alone (tcp_splice_read): it never sees
 * bypassed ones. A socket that has spliced never joins; readers that splice mostly begin with it,
 * before their socket is remembered. So one that still calls per round trip gets a struct tb_conn
 * for that alone. A member that splices for the first time is seen at that moment, and leaves.
 * Where this program cannot be attached, no application's socket joins: the mode is `proxy-only`.
 */

/* Attached to the entry of tcp_splice_read(struct socket *, ...), net/ipv4/tcp.c. */
int tb_watch_splice(__u64 *arguments)
{
	void *socket = (void *)arguments[0], *sk;
	struct tb_conn *conn;
	int is_young;

	sk = *(void *volatile *)(socket + OFF_SOCKET_SK);
	if (!sk)
		return 0;
	is_young = tb_read8((__u64)sk + OFF_TCP_SOCK_CB_FLAGS) & TB_CALL_PER_ROUND_TRIP;
	conn = conns.sk_storage_get(sk, 0, is_young ? BPF_SK_STORAGE_GET_F_CREATE : 0);
	if (!conn)
		return 0;
	if (!conn->me.id)
		conn->refused = TB_OUTCOME_SPLICE; /* tb_meet() counts it */
	else if (!conn->refused)
		tb_refuse(conn, TB_OUTCOME_SPLICE);
	if (tb_membership(conn->state) != TB_OUT)
		tb_ring(conn->me.pod_id);
	return 0;
}
