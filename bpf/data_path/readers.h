/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Which sockets may be in the sockhash.
 *
 * RULE (readers). recv(2) of a socket in a sockhash waits once: a wake-up without data ends it
 * with EAGAIN (tcp_bpf_recvmsg). So a socket is not in the sockhash if its reader may sleep in
 * recv. Its file is O_NONBLOCK at each packet of the exchanges that are watched before it joins,
 * and at each message bypassed to it.
 *
 * RULE (Nagle). Without TCP_NODELAY, TCP holds back a small message until the last one is
 * acknowledged. Over TCP the peer's answer acknowledges it. A bypassed answer does not, and the
 * message waits for the peer's timer, 40 ms. So while such an end has bytes unacknowledged, its
 * peer's messages go by TCP, at once. If one of its own goes by TCP then, it does not wait for
 * answers, and leaves for good. Each goes in one piece, or TCP would hold back the second one. Two
 * such ends do not join: each would keep the other on TCP.
 */

#define TB_MAX_WAITERS 8
#define TB_MANY_SLEEPERS 0x10000
#define TB_HELD 50000 /* nanoseconds: longer than a peek, a packet or a copy takes */
#define TB_LOOKS 2048
#define TB_STACK_SIZE (64 * 1024) /* at least THREAD_SIZE: so much with pages of 64 KB */

/* Has the application set an option that changes what its reads return, or when? Time stamps come
 * with packets only, and a filter (SO_ATTACH_BPF) drops packets. sk_tsflags has 16 bits before
 * Linux 6.5: all of SO_TIMESTAMPING but details. SO_RCVBUF makes the buffer one that cannot grow:
 * RULE (bound). */
static __always_inline int tb_has_options(__u64 sk)
{
	return TB_READ(__u16, sk + OFF_SOCK_TSFLAGS) || tb_read64(sk + OFF_SOCK_FILTER) ||
	       (tb_read64(sk + OFF_SOCK_FLAGS) & (1ULL << BIT_SOCK_RCVTSTAMP)) ||
	       (int)tb_read32(sk + OFF_SOCK_RCVLOWAT) > 1 ||
	       (int)tb_read32(sk + OFF_SOCK_PEEK_OFF) >= 0 ||
	       (tb_read8(sk + OFF_SOCK_USERLOCKS) & MASK_SOCK_RCVBUF_LOCK);
}

static __always_inline int tb_is_nonblocking(__u64 file)
{
	return (tb_read32(file + OFF_FILE_FLAGS) & O_NONBLOCK) != 0;
}

static __always_inline int tb_has_nodelay(__u64 sk)
{
	return (tb_read8(sk + OFF_TCP_SOCK_NONAGLE) & MASK_TCP_NAGLE_OFF) != 0;
}

/* Would TCP hold back a small message of this socket's? */
static __always_inline int tb_waits_for_ack(__u64 sk)
{
	return !tb_has_nodelay(sk) &&
	       tb_read32(sk + OFF_TCP_SOCK_SND_UNA) != tb_read32(sk + OFF_TCP_SOCK_WRITE_SEQ);
}

/* Why this socket must stay out of the sockhash for good, as an enum tb_outcome; 0: it need not.
 * MPTCP subflows in a sockhash crashed kernels. kTLS (a ULP) would have plaintext redirected. For a
 * bypassed MSG_ZEROCOPY no completion comes. Block devices of the kernel (SOCK_MEMALLOC, as nbd
 * has) use what short sends leave of msg_iter. */
static __always_inline __u32 tb_unfit(__u64 sk)
{
	__u64 flags = 1ULL << BIT_SOCK_ZEROCOPY | 1ULL << BIT_SOCK_MEMALLOC;
	__u64 file = tb_file(sk);

	if ((tb_read8(sk + OFF_TCP_SOCK_IS_MPTCP) & MASK_TCP_SOCK_IS_MPTCP) ||
	    tb_read64(sk + OFF_ICSK_ULP_OPS) || (tb_read64(sk + OFF_SOCK_FLAGS) & flags))
		return TB_OUTCOME_INELIGIBLE;
	if (file && !tb_is_nonblocking(file))
		return TB_OUTCOME_BLOCKING;
	return tb_has_options(sk) ? TB_OUTCOME_OPTIONS : 0;
}

/* Is an address on the stack of a thread, by its struct task_struct? */
static __always_inline int tb_is_on_stack(__u64 task, __u64 address)
{
	__u64 stack = tb_read64(task + OFF_TASK_STACK);

	return stack && address >= stack && address < stack + TB_STACK_SIZE;
}

/*
 * Does this entry of a socket's wait queue belong to a thread in poll(2) or select(2)? Its
 * `private` is then the struct poll_wqueues on that thread's own kernel stack. That of a thread in
 * recv is the thread's task.
 */
static __always_inline int tb_is_polling(__u64 private)
{
	__u64 task = tb_read64(private + OFF_POLL_WQUEUES_TASK);

	return task && tb_is_on_stack(task, private);
}

/*
 * How many threads are asleep in recv, or in another call on this socket? Their entries of the wait
 * queue have `private` set. epoll does not sleep there and leaves it NULL
 * (init_waitqueue_func_entry). A thread's entry is on its own stack. TB_MANY_SLEEPERS when there
 * are others, as io_uring has, or the queue is too long to be walked.
 */
static __always_inline __u32 tb_sleepers(__u64 sk)
{
	__u64 wq = tb_read64(sk + OFF_SOCK_WQ);
	__u64 head, entry, private;
	__u32 count = 0;
	int i;

	if (!wq)
		return 0;
	head = wq + OFF_SOCKET_WQ_HEAD;
	entry = tb_read64(head);
#pragma unroll
	for (i = 0; i < TB_MAX_WAITERS; i++) {
		if (entry == head)
			return count;
		if (!entry)
			break;
		private = tb_read64(entry - OFF_WAIT_ENTRY + OFF_WAIT_PRIVATE);
		if (private && tb_is_on_stack(private, entry))
			count++;
		else if (private && !tb_is_polling(private))
			return TB_MANY_SLEEPERS;
		entry = tb_read64(entry);
	}
	return TB_MANY_SLEEPERS;
}

/* Does a thread inside a call hold this socket's lock? */
static __always_inline int tb_is_owned(__u64 sk)
{
	return tb_read32(sk + OFF_SOCK_LOCK_OWNED) != 0;
}

/* And for longer than a call takes that looks at what is unread, and leaves it (MSG_PEEK)? */
static __always_inline int tb_is_held(__u64 sk)
{
	__u64 began = bpf_ktime_get_ns();
	int i;

#pragma clang loop unroll(disable)
	for (i = 0; i < TB_LOOKS; i++) {
		if (!tb_is_owned(sk))
			return 0;
		if (bpf_ktime_get_ns() - began > TB_HELD)
			return 1;
	}
	return 1;
}
