/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Short sends.
 *
 * RULE (short sends). A full send buffer makes a send short. In a sockhash the kernel has by then
 * consumed all of msg_iter (tcp_bpf_sendmsg). Most callers use the return value. sendmmsg(2) and
 * io_uring use what is left of msg_iter, and go on behind a hole. So a socket on which a thread
 * sends in such a way never joins, and a member leaves.
 */

/* task_struct.flags: a thread of the kernel's that works for io_uring. */
#define PF_IO_WORKER 0x10

/* System calls, by their numbers in struct pt_regs. Those of 32-bit callers name no other call that
 * sends. */
#define IO_URING_ENTER 426
#define TB_UNKNOWN_CALL 0xffffffff /* as of a thread that works for io_uring */
#ifdef __aarch64__
#define SENDMMSG 269
#define SENDMMSG_OF_32_BITS 374
#define SENDMMSG_X32 SENDMMSG
#define SOCKETCALL SENDMMSG
#else
#define SENDMMSG 307
#define SENDMMSG_OF_32_BITS 345
#define SENDMMSG_X32 0x4000021a
#define SOCKETCALL 102 /* i386: sendmmsg is one of its calls */
#endif

static void *(*tb_current_task_btf)(void) = (void *)BPF_FUNC_get_current_task_btf;
static void *(*tb_task_pt_regs)(void *task) = (void *)BPF_FUNC_task_pt_regs;

/* Notes, once, where on its stack a thread's registers lie: at one place in each. */
static __always_inline void tb_find_registers(void)
{
	void *task, *registers;
	__u64 stack = 0, address = 0;
	int zero = 0;
	__u64 *at = registers_at.lookup(&zero);

	if (!at || *at)
		return;
	task = tb_current_task_btf();
	registers = tb_task_pt_regs(task);
	tb_probe_read_kernel(&stack, sizeof(stack), task + OFF_TASK_STACK);
	tb_probe_read_kernel(&address, sizeof(address), &registers);
	*at = address - stack;
}

/* The number of the current thread's system call. */
static __always_inline __u32 tb_current_call(void)
{
	__u64 task = bpf_get_current_task();
	int zero = 0;
	__u64 *at = registers_at.lookup(&zero);

	if (!at || !*at || (tb_read32(task + OFF_TASK_FLAGS) & PF_IO_WORKER))
		return TB_UNKNOWN_CALL;
	return tb_read32(tb_read64(task + OFF_TASK_STACK) + *at + OFF_PT_REGS_CALL);
}

/* Would the current thread, which is inside a send, go on behind a hole? */
static __always_inline int tb_ignores_short_sends(void)
{
	__u32 call = tb_current_call();

	return call == SENDMMSG || call == SENDMMSG_OF_32_BITS || call == SENDMMSG_X32 ||
	       call == SOCKETCALL || call == IO_URING_ENTER || call == TB_UNKNOWN_CALL;
}
