/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The system call by which a thread sends.
 *
 * RULE (short sends). A full send buffer makes a send short. In a sockhash the kernel has by then
 * consumed all of msg_iter (tcp_bpf_sendmsg). Most callers use the return value. sendmmsg(2) and
 * io_uring use what is left of msg_iter, and go on behind a hole. So a socket on which a thread
 * sends in such a way never joins, and a member leaves.
 *
 * RULE (urgent). The urgent byte (MSG_OOB) is not in the stream that its receiver reads, but a
 * redirect would put it there. So it goes by TCP, at once, and both ends leave. So does what the
 * kernel is to tell the sender of: MSG_ZEROCOPY's completions, time stamps.
 */

/* task_struct.flags: a thread of the kernel's that works for io_uring. */
#define PF_IO_WORKER 0x10

#define MSG_OOB 1

/* System calls, by their numbers in struct pt_regs. Those of 32-bit callers name no other call that
 * sends. */
#define IO_URING_ENTER 426
#define TB_UNKNOWN_CALL 0xffffffff /* as of a thread that works for io_uring, or of x32 */
#define TB_X32 0x40000000
#ifdef __aarch64__
#define SENDTO 206
#define SENDMSG 211
#define SEND_OF_32_BITS 289
#define SENDTO_OF_32_BITS 290
#define SENDMSG_OF_32_BITS 296
#define SENDMMSG 269
#define SENDMMSG_OF_32_BITS 374
#else
#define SENDTO 44
#define SENDMSG 46
#define SENDTO_OF_32_BITS 369
#define SENDMSG_OF_32_BITS 370
#define SEND_OF_32_BITS SENDTO_OF_32_BITS
#define SENDMMSG 307
#define SENDMMSG_OF_32_BITS 345
#endif
#define SOCKETCALL 102 /* i386: any send, with flags where they are not looked for */

static void *(*tb_current_task_btf)(void) = (void *)BPF_FUNC_get_current_task_btf;
static void *(*tb_task_pt_regs)(void *task) = (void *)BPF_FUNC_task_pt_regs;

/* The number of a thread's system call. */
static __always_inline __u32 tb_call_of(void *task)
{
	__u32 call = TB_OWN(__u32, tb_task_pt_regs(task), OFF_PT_REGS_CALL);

	return (TB_OWN(__u32, task, OFF_TASK_FLAGS) & PF_IO_WORKER) || (call & TB_X32)
		       ? TB_UNKNOWN_CALL
		       : call;
}

/* Is the current thread's send neither urgent nor one that goes on behind a hole? */
static __always_inline int tb_is_plain_send(void)
{
	void *task = tb_current_task_btf(), *registers = tb_task_pt_regs(task);
	__u32 call = tb_call_of(task), flags = 0;

	if (call == SENDTO || call == SENDMMSG)
		flags = TB_OWN(__u32, registers, OFF_PT_REGS_FOURTH);
	else if (call == SENDMSG || call == SENDMSG_OF_32_BITS)
		flags = TB_OWN(__u32, registers, OFF_PT_REGS_THIRD);
	else if (call == SENDTO_OF_32_BITS || call == SEND_OF_32_BITS ||
		 call == SENDMMSG_OF_32_BITS)
		flags = TB_OWN(__u32, registers, OFF_PT_REGS_FOURTH_OF_32_BITS);
	if ((flags & MSG_OOB) || call == SOCKETCALL)
		return 0;
	return call != SENDMMSG && call != SENDMMSG_OF_32_BITS && call != IO_URING_ENTER &&
	       call != TB_UNKNOWN_CALL;
}

/* Is the kernel to tell the sender what has become of its bytes? Of bypassed ones it tells nothing.
 */
static __always_inline int tb_expects_notice(const void *tp)
{
	return (TB_OWN(__u64, tp, OFF_SOCK_FLAGS) & (1ULL << BIT_SOCK_ZEROCOPY)) ||
	       TB_OWN(__u16, tp, OFF_SOCK_TSFLAGS);
}
