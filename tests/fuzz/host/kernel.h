/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * As much of a kernel as tcpip_bypass.c asks for, in plain C: so that the very rules that run in
 * the kernel can be run in a test, in states that no machine reaches on demand: a lock held at the
 * wrong moment, a thread that rests between verdict and queue, another CPU's step between two
 * looks.
 */
#ifndef HOST_KERNEL_H
#define HOST_KERNEL_H

#include <stddef.h>
#include <string.h>

#undef __always_inline /* the programs bring their own */

struct list {
	struct list *next;
};

/* As much of a struct sk_msg as is read. */
struct host_message {
	__u32 size;
	struct list list;
};

struct waiter {
	void *private;
	struct list entry;
};

struct wait_queue {
	struct list head;
};

/* A map that has the socket of a psock. */
struct link {
	struct list list;
	__u64 map;
};

struct psock {
	struct list ingress, link;
	__u32 refcnt, msg_tot_len;
};

struct host_sock {
	__u64 flags, ulp, user_data, wq, prot, net, socket, memcg, filter;
	__u32 rcvbuf, sndbuf, rcvlowat, uid, copied_seq, write_seq, rcv_nxt, snd_una, owned,
		rcv_wnd, spinlock, urg_seq;
	__u32 bytes_acked, bytes_received;
	__s32 peek_off;
	__u32 tsflags;
	__u16 urg_data;
	__u8 is_mptcp, nonagle, userlocks, state;
};

struct host_net {
	__u32 tcp_rmem[3];
	__u8 shrinks;
};

struct page_counter {
	__u64 usage, high, max, parent;
};

/* A cgroup: what it is charged, in pages, and pages of files among that. */
struct memcg {
	struct page_counter memory;
	__u64 vmstats, cached;
};

struct host_file {
	__u32 flags;
};

struct host_socket {
	__u64 file, sk;
};

struct proto {
	__u64 memory_allocated, memory_pressure, sysctl_mem;
};

struct request {
	__u32 rcv_isn, snt_isn;
};

struct host_task {
	__u64 stack, flags;
};

struct poll_wqueues {
	__u64 task;
};

#define OFF_FILE_FLAGS offsetof(struct host_file, flags)
#define OFF_ICSK_ULP_OPS offsetof(struct host_sock, ulp)
#define OFF_MEMCG_MEMORY offsetof(struct memcg, memory)
#define OFF_MEMCG_VMSTATS offsetof(struct memcg, vmstats)
#define OFF_MEMCG_VMSTATS_STATE 0
#define OFF_BPF_MAP_ID 0
#define OFF_NET_COOKIE 0
#define OFF_NET_NS_INODE 0
#define OFF_NET_TCP_RMEM offsetof(struct host_net, tcp_rmem)
#define OFF_NET_TCP_SHRINK_WINDOW offsetof(struct host_net, shrinks)
#define OFF_PAGE_COUNTER_HIGH offsetof(struct page_counter, high)
#define OFF_PAGE_COUNTER_MAX offsetof(struct page_counter, max)
#define OFF_PAGE_COUNTER_PARENT offsetof(struct page_counter, parent)
#define OFF_PAGE_COUNTER_USAGE offsetof(struct page_counter, usage)
#define OFF_POLL_WQUEUES_TASK offsetof(struct poll_wqueues, task)
#define OFF_PROTO_MEMORY_ALLOCATED offsetof(struct proto, memory_allocated)
#define OFF_PROTO_MEMORY_PRESSURE offsetof(struct proto, memory_pressure)
#define OFF_PROTO_SYSCTL_MEM offsetof(struct proto, sysctl_mem)
#define OFF_PSOCK_INGRESS_MSG offsetof(struct psock, ingress)
#ifndef OFF_PSOCK_MSG_TOT_LEN /* of newer kernels: then with its place */
#define OFF_PSOCK_MSG_TOT_LEN 0
#endif
#define OFF_PSOCK_LINK offsetof(struct psock, link)
#define OFF_PSOCK_REFCNT offsetof(struct psock, refcnt)
#define OFF_SK_MSG_LIST offsetof(struct host_message, list)
#define OFF_SK_MSG_SIZE offsetof(struct host_message, size)
#define OFF_SK_PSOCK_LINK_MAP offsetof(struct link, map)
#define OFF_SOCKET_FILE offsetof(struct host_socket, file)
#define OFF_SOCKET_SK offsetof(struct host_socket, sk)
#define OFF_SOCKET_WQ_HEAD offsetof(struct wait_queue, head)
#define OFF_SOCK_FLAGS offsetof(struct host_sock, flags)
#define OFF_SOCK_LOCK_OWNED offsetof(struct host_sock, owned)
#define OFF_SOCK_MEMCG offsetof(struct host_sock, memcg)
#define OFF_SOCK_NET offsetof(struct host_sock, net)
#define OFF_SOCK_OPS_SK 0
#define OFF_SOCK_PEEK_OFF offsetof(struct host_sock, peek_off)
#define OFF_SOCK_PROT offsetof(struct host_sock, prot)
#define OFF_SOCK_RCVBUF offsetof(struct host_sock, rcvbuf)
#define OFF_SOCK_RCVLOWAT offsetof(struct host_sock, rcvlowat)
#define OFF_SOCK_SNDBUF offsetof(struct host_sock, sndbuf)
#define OFF_SOCK_SOCKET offsetof(struct host_sock, socket)
#define OFF_SOCK_SPINLOCK offsetof(struct host_sock, spinlock)
#define OFF_SOCK_STATE offsetof(struct host_sock, state)
#define OFF_SOCK_FILTER offsetof(struct host_sock, filter)
#define OFF_SOCK_TSFLAGS offsetof(struct host_sock, tsflags)
#define OFF_SOCK_UID offsetof(struct host_sock, uid)
#define OFF_SOCK_USERLOCKS offsetof(struct host_sock, userlocks)
#define OFF_SOCK_USER_DATA offsetof(struct host_sock, user_data)
#define OFF_SOCK_WQ offsetof(struct host_sock, wq)
#define OFF_PT_REGS_CALL 0
#define OFF_PT_REGS_THIRD 8
#define OFF_PT_REGS_FOURTH 16
#define OFF_PT_REGS_FOURTH_OF_32_BITS 24
#define OFF_TASK_FLAGS offsetof(struct host_task, flags)
#define OFF_TASK_STACK offsetof(struct host_task, stack)
#define OFF_TCP_REQUEST_RCV_ISN offsetof(struct request, rcv_isn)
#define OFF_TCP_REQUEST_SNT_ISN offsetof(struct request, snt_isn)
#define OFF_TCP_SOCK_BYTES_ACKED offsetof(struct host_sock, bytes_acked)
#define OFF_TCP_SOCK_BYTES_RECEIVED offsetof(struct host_sock, bytes_received)
#define OFF_TCP_SOCK_COPIED_SEQ offsetof(struct host_sock, copied_seq)
#define OFF_TCP_SOCK_IS_MPTCP offsetof(struct host_sock, is_mptcp)
#define OFF_TCP_SOCK_NONAGLE offsetof(struct host_sock, nonagle)
#define OFF_TCP_SOCK_RCV_NXT offsetof(struct host_sock, rcv_nxt)
#define OFF_TCP_SOCK_RCV_WND offsetof(struct host_sock, rcv_wnd)
#define OFF_TCP_SOCK_SND_UNA offsetof(struct host_sock, snd_una)
#define OFF_TCP_SOCK_URG_DATA offsetof(struct host_sock, urg_data)
#define OFF_TCP_SOCK_URG_SEQ offsetof(struct host_sock, urg_seq)
#define OFF_TCP_SOCK_WRITE_SEQ offsetof(struct host_sock, write_seq)
/* Of tb_take_in() alone, which does not run here. */
#define OFF_SOCKOPT_SK 0
#define OFF_TCP_SOCK_BYTES_RETRANS 0
#define OFF_TCP_SOCK_BYTES_SENT 0
#define OFF_TCP_SOCK_CALLS 0
#define OFF_TCP_SOCK_SND_NXT 0
#define OFF_WAIT_ENTRY offsetof(struct waiter, entry)
#define OFF_WAIT_PRIVATE offsetof(struct waiter, private)
#define MASK_TCP_SOCK_IS_MPTCP 1
#define MASK_TCP_NAGLE_OFF 1
#define MASK_TCP_NAGLE_CORK 2
#define MASK_SOCK_RCVBUF_LOCK 2
#define BIT_SOCK_ZEROCOPY 0
#define BIT_SOCK_RCVTSTAMP 2
#define BIT_SOCK_DONE 3
#define BIT_SOCK_URGINLINE 4
#define BIT_SOCK_MEMALLOC 5
#define TB_INACTIVE_FILE 0
#define PAGE_SIZE 4096

#define bpf_htonl(x) __builtin_bswap32(x)
#define bpf_ntohl(x) __builtin_bswap32(x)

/* bcc's maps have methods; here they are members that point to functions. */
#define BPF_CGROUP_STORAGE(map, leaf)                                                              \
	static struct {                                                                            \
		leaf *(*get_local_storage)(int);                                                   \
	} map
#define BPF_SK_STORAGE(map, leaf)                                                                  \
	static struct {                                                                            \
		leaf *(*sk_storage_get)(void *, void *, int);                                      \
	} map
#define BPF_SOCKHASH(map, key, size)                                                               \
	static struct {                                                                            \
		int (*update)(key *, void *);                                                      \
		int (*msg_redirect_hash)(void *, key *, int);                                      \
		int (*delete)(key *);                                                              \
	} map
#define BPF_F_TABLE(kind, key, leaf, map, size, flags)                                             \
	static struct {                                                                            \
		leaf *(*lookup)(key *);                                                            \
		int (*insert)(key *, leaf *);                                                      \
		int (*update)(key *, leaf *);                                                      \
		int (*delete)(key *);                                                              \
	} map
#define BPF_ARRAY(map, leaf, size)                                                                 \
	static struct {                                                                            \
		leaf *(*lookup)(int *);                                                            \
	} map
#define BPF_RINGBUF_OUTPUT(map, pages)                                                             \
	static struct {                                                                            \
		int (*ringbuf_output)(void *, int, int);                                           \
	} map

#define BPF_FUNC_probe_read_kernel host_probe_read_kernel
#define BPF_FUNC_probe_write_user host_probe_write_user
#define BPF_FUNC_get_socket_cookie host_socket_cookie
#define BPF_FUNC_sock_from_file host_sock_from_file
#define BPF_FUNC_ktime_get_coarse_ns bpf_ktime_get_ns
#define BPF_FUNC_get_current_task_btf host_current_task
#define BPF_FUNC_task_pt_regs host_registers_of

#define HOST_LOWEST 4096 /* where memory begins; what a null pointer leads to reads as zero */
#define HOST_HIGHEST (1ULL << 47)

static __u64 host_now;
static int host_reads_left; /* before the read that reaches 0, `host_meanwhile` runs */
static void (*host_meanwhile)(void);

/* Other CPUs take their steps between two looks at the kernel's memory. */
static inline int host_probe_read_kernel(void *to, __u32 size, const void *from)
{
	if (host_reads_left && !--host_reads_left)
		host_meanwhile();
	memset(to, 0, size);
	if ((__u64)from >= HOST_LOWEST && (__u64)from < HOST_HIGHEST)
		memcpy(to, from, size);
	return 0;
}

static inline long host_probe_write_user(void *to, const void *from, __u32 size)
{
	memcpy(to, from, size);
	return 0;
}

static inline __u64 bpf_ktime_get_ns(void)
{
	return host_now;
}

/* The one thread that sends. Its system call and arguments lie at the end of its stack. */
static __u64 host_stack[5];
static struct host_task host_task;

static inline void *host_current_task(void)
{
	host_task.stack = (__u64)host_stack;
	return &host_task;
}

static inline __u64 bpf_get_current_task(void)
{
	return (__u64)host_current_task();
}

static inline void *host_registers_of(void *task)
{
	(void)task;
	return &host_stack[1];
}

static inline void *bpf_skc_to_tcp_sock(void *sk)
{
	return sk;
}

static inline void *host_sock_from_file(void *file)
{
	return file;
}

static inline __u64 host_socket_cookie(void *context)
{
	return (__u64)context;
}

/* switch.c */

static inline int bpf_msg_pull_data(void *msg, __u32 start, __u32 end, __u64 flags)
{
	(void)msg, (void)start, (void)end, (void)flags;
	return 0;
}

/* Not through an iterator is a file visited here: host_visit(). */
static inline int bpf_seq_write(void *seq, const void *data, __u32 size)
{
	(void)seq, (void)data, (void)size;
	return -1;
}

/* No connection is set up here. */
static inline int bpf_reserve_hdr_opt(void *context, __u32 size, __u64 flags)
{
	(void)context, (void)size, (void)flags;
	return -1;
}

static inline int bpf_store_hdr_opt(void *context, const void *option, __u32 size, __u64 flags)
{
	(void)context, (void)option, (void)size, (void)flags;
	return -1;
}

static inline int bpf_load_hdr_opt(void *context, void *option, __u32 size, __u64 flags)
{
	(void)context, (void)option, (void)size, (void)flags;
	return -1;
}

static inline int bpf_setsockopt(void *context, int level, int name, void *value, int size)
{
	(void)context, (void)level, (void)name, (void)value, (void)size;
	return -1;
}

static inline int bpf_sock_ops_cb_flags_set(struct bpf_sock_ops *context, int flags)
{
	context->bpf_sock_ops_cb_flags = flags;
	return 0;
}

#endif
