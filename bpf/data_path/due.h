/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * When a pass over a pod's processes is due.
 *
 * A pass costs as much as some hundred exchanges save. So the connections that wait to join, or to
 * leave, add up what they miss. When that is what a pass costs there, the joiner hears of it. It
 * writes the cost, as it measures it. So joins never take more of a CPU than they give back.
 * Edges (edge.h) are owed, whatever they cost: they have a budget of their own.
 */

#define TB_EXCHANGE_BYTES 32768 /* so many bytes count as another exchange */

/* Tells the joiner at once. An event that finds no room is not lost: the joiner looks at `pending`
 * now and then, while it has something to spend. */
static __always_inline void tb_ring_for(__u64 pod_id, __u32 edge)
{
	struct tb_due *d = due.lookup(&pod_id);

	if (!d || (d->pending && d->edge >= edge))
		return;
	if (edge) /* else another CPU may just have set it */
		d->edge = 1;
	d->pending = 1;
	bell.ringbuf_output(&edge, sizeof(edge), 0);
}

static __always_inline void tb_ring(__u64 pod_id)
{
	tb_ring_for(pod_id, 0);
}

static __always_inline void tb_ring_for_edge(__u64 pod_id)
{
	tb_ring_for(pod_id, 1);
}

static __always_inline void tb_miss(__u64 pod_id, __u32 exchanges)
{
	struct tb_due *d = due.lookup(&pod_id);

	if (!d)
		return;
	__sync_fetch_and_add(&d->missed, exchanges);
	if (d->missed >= d->cost)
		tb_ring(pod_id);
}
