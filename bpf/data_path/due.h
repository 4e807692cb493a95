/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * When a pass over a pod's processes is due.
 *
 * A pass costs as much as some hundred exchanges save. So the connections that wait to join, or to
 * leave, add up what they miss. When that is what a pass costs there, the joiner hears of it. It
 * writes the cost, as it measures it. So the joiner never takes more of a CPU than it gives back.
 */

#define TB_EXCHANGE_BYTES 32768 /* so many bytes count as another exchange */

/* Tells the joiner at once. An event that finds no room is not lost: the joiner looks at `pending`
 * now and then. */
static __always_inline void tb_ring(__u64 pod_id)
{
	struct tb_due *d = due.lookup(&pod_id);

	if (!d || d->pending)
		return;
	d->pending = 1;
	bell.ringbuf_output(&pod_id, sizeof(pod_id), 0);
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
