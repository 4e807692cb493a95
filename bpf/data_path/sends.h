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
 * redirect would put it there. So it goes by TCP, at once, and both ends leave.
 */

/* task_struct.flags: a thread of the kernel's that works for io_uring. */
#define PF_IO_WORKER 0x10

#define MSG_OOB 1

/* System calls, by their numbers in struct pt_regs. Those of 32-bit callers name no other call that
 * sends. */
#define IO_URING_ENTER 426
#define TB_UNKNOWN_CALL 0xffffffff /* as of a thread that works for io_uring */
#ifdef __aarch64__
#define SENDTO 206
#define SENDMSG 211
#define SEND_OF_32_BITS 289
#define SENDTO_OF_32_BITS 290
#define SENDMSG_OF_32_BITS 296
#define SENDTO_X32 SENDTO
#define SENDMSG_X32 SENDMSG
#define SENDMMSG 269
#define SENDMMSG_OF_32_BITS 374
#define SENDMMSG_X32 SENDMMSG
#else
#define SENDTO 44
#define SENDMSG 46
#define SENDTO_X32 0x4000002c
#define SENDMSG_X32 0x40000206
#define SENDTO_OF_32_BITS 369
#define SENDMSG_OF_32_BITS 370
#define SEND_OF_32_BITS SENDTO_OF_32_BITS
#define SENDMMSG 307
#define SENDMMSG_OF_32_BITS 345
#define SENDMMSG_X32 0x4000021a
#endif
#define SOCKETCALL 102 /* i386: any send, with flags where they are not looked for */

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

/* Where the registers of the current thread's system call lie; 0 where they do not say what it
 * sends, as in a thread that works for io_uring. */
static __always_inline __u64 tb_registers(void)
{
	__u64 task = bpf_get_current_task();
	int zero = 0;
	__u64 *at = registers_at.lookup(&zero);

	if (!at || !*at || (tb_read32(task + OFF_TASK_FLAGS) & PF_IO_WORKER))
		return 0;
	return tb_read64(task + OFF_TASK_STACK) + *at;
}

/* The number of that call. */
static __always_inline __u32 tb_call_of(__u64 registers)
{
	return registers ? tb_read32(registers + OFF_PT_REGS_CALL) : TB_UNKNOWN_CALL;
}

/* How the current thread sends, which is inside a send. */
enum tb_sending {
	TB_SENDS_PLAIN,
	TB_SENDS_URGENT,
	TB_SENDS_ON, /* goes on behind a hole */
};

static __always_inline __u32 tb_sending(void)
{
	__u64 registers = tb_registers();
	__u32 call = tb_call_of(registers), flags = 0;

	if (call == SENDTO || call == SENDTO_X32 || call == SENDMMSG || call == SENDMMSG_X32)
		flags = tb_read32(registers + OFF_PT_REGS_FOURTH);
	else if (call == SENDMSG || call == SENDMSG_X32 || call == SENDMSG_OF_32_BITS)
		flags = tb_read32(registers + OFF_PT_REGS_THIRD);
	else if (call == SENDTO_OF_32_BITS || call == SEND_OF_32_BITS ||
		 call == SENDMMSG_OF_32_BITS)
		flags = tb_read32(registers + OFF_PT_REGS_FOURTH_OF_32_BITS);
	if ((flags & MSG_OOB) || call == SOCKETCALL)
		return TB_SENDS_URGENT;
	if (call == SENDMMSG || call == SENDMMSG_OF_32_BITS || call == SENDMMSG_X32 ||
	    call == IO_URING_ENTER || call == TB_UNKNOWN_CALL)
		return TB_SENDS_ON;
	return TB_SENDS_PLAIN;
}
