/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * When a socket calls the programs.
 */

enum tb_calls {
	TB_CALL_NEVER,
	TB_CALL_PER_ROUND_TRIP = BPF_SOCK_OPS_RTT_CB_FLAG,
	/* Per packet that it sends, and when its state changes. */
	TB_CALL_PER_PACKET = BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG | BPF_SOCK_OPS_STATE_CB_FLAG,
};

/* Tells a client's socket from a server's later on: a flag for calls that come seldom. Flags stay
 * when the programs are loaded anew. */
#define TB_CLIENT BPF_SOCK_OPS_RTO_CB_FLAG

static __always_inline void tb_set_flags(struct bpf_sock_ops *skops, int flags)
{
	if (flags != skops->bpf_sock_ops_cb_flags)
		bpf_sock_ops_cb_flags_set(skops, flags);
}

/* Of these calls the socket now gets those alone, for all programs on the cgroup. */
static __always_inline void tb_call(struct bpf_sock_ops *skops, enum tb_calls when)
{
	int all = TB_CALL_PER_ROUND_TRIP | TB_CALL_PER_PACKET;

	tb_set_flags(skops, (skops->bpf_sock_ops_cb_flags & ~all) | when);
}

/* A connection is established, or the programs have been loaded anew since. Another program's calls
 * go on. */
static __always_inline void tb_begin(struct bpf_sock_ops *skops, int client)
{
	tb_set_flags(skops,
		     (skops->bpf_sock_ops_cb_flags & ~TB_CLIENT) | TB_CALL_PER_ROUND_TRIP | client);
}
