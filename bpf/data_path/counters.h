/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What is counted for the operator, per pod and hop.
 */

static __always_inline struct tb_counters *tb_counters_of(__u64 pod_id, __u32 hop)
{
	struct tb_counter_key key = {.pod_id = pod_id, .hop = hop};

	return counters.lookup(&key);
}

/* Only here are a pod's counters created: messages of a pod that was DELed must not. */
static __always_inline void tb_count_outcome(__u64 pod_id, __u32 hop, __u32 outcome)
{
	struct tb_counter_key key = {.pod_id = pod_id, .hop = hop};
	int zero = 0;
	struct tb_counters *zeros = no_counters.lookup(&zero), *c;
	__u64 index = outcome;

	if (zeros)
		counters.insert(&key, zeros); /* unless there are some */
	c = counters.lookup(&key);
	/* The verifier of 6.1 follows the very register that was compared. */
	TB_PIN(index);
	if (c && index < TB_OUTCOMES)
		c->connections[index]++;
}

/* This socket must stay out of the sockhash for good. */
static __always_inline void tb_refuse(struct tb_conn *conn, __u32 outcome)
{
	conn->refused = outcome;
	tb_count_outcome(conn->me.pod_id, tb_hop(conn), outcome);
}

static __always_inline void tb_count_membership(const struct tb_conn *conn, int joins)
{
	struct tb_counters *c = tb_counters_of(conn->me.pod_id, tb_hop(conn));

	if (c && joins)
		c->joined++;
	else if (c)
		c->left++;
}

/* Bypassed messages are tallied in the socket's own storage and carried over once a tick: the
 * lookup would be a tenth of what a message costs here. */
static __always_inline void tb_flush_tally(struct tb_conn *conn)
{
	struct tb_counters *c;

	if (!conn->tally.messages)
		return;
	c = tb_counters_of(conn->me.pod_id, tb_hop(conn));
	if (c) {
		c->bypassed_messages += conn->tally.messages;
		c->bypassed_bytes += conn->tally.bytes;
	}
	conn->tally.messages = 0;
	conn->tally.bytes = 0;
}

static __always_inline void tb_count_bypassed(struct tb_conn *conn, __u32 size, __u64 now)
{
	conn->tally.messages++;
	conn->tally.bytes += size;
	if (conn->tally.at == now)
		return;
	conn->tally.at = now;
	tb_flush_tally(conn);
}

/* `reason` is an enum tb_reason. */
static __always_inline void tb_count_tcp(struct tb_conn *conn, __u32 reason, __u32 bytes)
{
	struct tb_counters *c = tb_counters_of(conn->me.pod_id, tb_hop(conn));

	if (!c || reason >= TB_REASONS)
		return;
	c->tcp_messages[reason]++;
	c->tcp_bytes += bytes;
}
