/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * FIONREAD.
 *
 * RULE (fionread). ioctl(FIONREAD) must say what TCP alone would. For a socket in a sockhash
 * kernels count either TCP's bytes only, or bypassed ones only (tcp_bpf_ioctl, where a struct
 * sk_psock has msg_tot_len). There the right answer is written over the kernel's own, at the
 * address where the kernel has just written that. For members of this sockhash only, and those that
 * join or have left: the kernel's own answer may be older.
 *
 * No lock is held. Another thread may read meanwhile, which frees messages. So the socket is looked
 * at, its bytes are added up, and it is looked at again. A sum between two equal looks was true at
 * one moment. Where the looks differ each time, the kernel's answer stands.
 */

#define FIONREAD 0x541B
#define TB_MAX_UNREAD (TB_MAX_BOUND / TB_MESSAGE_COST) /* messages: RULE (bound) */
/* How often it is added up. The verifier follows at most 8192 branches in a row. */
#define TB_TRIES 3
#define TB_SPINS 64

static long (*tb_probe_write_user)(void *to, const void *from,
				   __u32 size) = (void *)BPF_FUNC_probe_write_user;

/* What a read changes, or a packet. */
struct tb_look {
	__u32 received; /* rcv_nxt */
	__u32 copied;	/* copied_seq */
	__u64 flags;	/* sk_flags */
	__u64 head;	/* the first bypassed message */
	__u32 size;	/* what is left of it */
};

/* Bytes of the message that is at `list` in a bypass queue. */
static __always_inline __u32 tb_size_of(__u64 list)
{
	return tb_read32(list - OFF_SK_MSG_LIST + OFF_SK_MSG_SIZE);
}

/* Looks at a socket. While TCP holds the spinlock, for a packet, rcv_nxt may count a FIN that
 * SOCK_DONE does not show yet. It will within some ten nanoseconds. So rcv_nxt is read first, and
 * sk_flags when the spinlock is free or some hundred nanoseconds have passed. */
static __always_inline void tb_look_at(__u64 sk, __u64 queue, struct tb_look *look)
{
	int spins;

	look->received = tb_read32(sk + OFF_TCP_SOCK_RCV_NXT);
#pragma clang loop unroll(disable)
	for (spins = 0; spins < TB_SPINS && tb_read32(sk + OFF_SOCK_SPINLOCK); spins++)
		;
	look->flags = tb_read64(sk + OFF_SOCK_FLAGS);
	look->copied = tb_read32(sk + OFF_TCP_SOCK_COPIED_SEQ);
	look->head = queue ? tb_read64(queue) : 0;
	look->size = look->head == queue ? 0 : tb_size_of(look->head);
}

/* What TCP has unread, as tcp_inq() has it: up to an urgent byte, and without a FIN. */
static __always_inline __u32 tb_tcp_unread(__u64 sk, const struct tb_look *look)
{
	__u32 unread = look->received - look->copied;
	__u32 urgent = tb_read32(sk + OFF_TCP_SOCK_URG_SEQ) - look->copied;

	if (urgent < unread && TB_READ(__u16, sk + OFF_TCP_SOCK_URG_DATA) &&
	    !(look->flags & (1ULL << BIT_SOCK_URGINLINE)))
		return urgent;
	return unread - (unread && (look->flags & (1ULL << BIT_SOCK_DONE)));
}

/* Adds up what is bypassed and unread. Returns 0 if the end of the queue did not come. */
static __always_inline int tb_add_bypassed(__u64 psock, __u64 queue, __u64 head, __u32 *sum)
{
	int i;

	if (OFF_PSOCK_MSG_TOT_LEN && psock) { /* the kernel has done it */
		*sum = tb_read32(psock + OFF_PSOCK_MSG_TOT_LEN);
		return 1;
	}
	*sum = 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < TB_MAX_UNREAD; i++) {
		if (head == queue)
			return 1;
		*sum += tb_size_of(head);
		head = tb_read64(head);
	}
	return 0;
}

/* What FIONREAD should say in place of what the kernel has said; -1: that may stand. */
static __always_inline int tb_unread(const struct tb_conn *conn)
{
	__u64 sk = conn->me.sk, psock = tb_psock(sk), queue;
	struct tb_look first = {}, second = {};
	__u32 bypassed, by_tcp;
	int i;

	if (psock != conn->at.psock) {
		if (psock && conn->at.psock != TB_JOINING)
			return -1; /* another program's */
		psock = 0;
	}
	queue = psock ? psock + OFF_PSOCK_INGRESS_MSG : 0;
#pragma clang loop unroll(disable)
	for (i = 0; i < TB_TRIES; i++) {
		tb_look_at(sk, queue, &first);
		if (!tb_add_bypassed(psock, queue, first.head, &bypassed))
			continue;
		by_tcp = tb_tcp_unread(sk, &first);
		tb_look_at(sk, queue, &second);
		if (first.received != second.received || first.copied != second.copied ||
		    first.flags != second.flags || first.head != second.head ||
		    first.size != second.size)
			continue;
		return (OFF_PSOCK_MSG_TOT_LEN ? by_tcp : bypassed) ? bypassed + by_tcp : -1;
	}
	return -1;
}

/* A write fails where the page cannot be written at once, as a fork has just made it. */
static __always_inline void tb_answer(void *to, __u32 answer)
{
	int zero = 0;
	struct tb_fionread *counted = fionread.lookup(&zero);

	if (tb_probe_write_user(to, &answer, sizeof(answer)) && counted)
		__sync_fetch_and_add(&counted->lost, 1);
}

/* Attached to the exit of inet_ioctl(struct socket *, unsigned int, unsigned long), and of
 * inet6_ioctl. The result follows the three arguments. */
int tb_mend(__u64 *context)
{
	void *socket = (void *)context[0], *sk;
	struct tb_conn *conn;
	int answer = TB_CANARY_ANSWER;

	if ((__u32)context[1] != FIONREAD || (int)context[3])
		return 0;
	sk = *(void *volatile *)(socket + OFF_SOCKET_SK);
	conn = sk ? conns.sk_storage_get(sk, 0, 0) : 0;
	if (!conn)
		return 0;
	if (conn->me.id != TB_CANARY) {
		if (!conn->me.id || !conn->at.psock)
			return 0;
		answer = tb_unread(conn);
	}
	if (answer >= 0)
		tb_answer((void *)context[2], answer);
	return 0;
}
