/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Reading the kernel's memory.
 *
 * RULE (reads). A program cannot hold a reference to its peer's socket. It keeps kernel addresses
 * as numbers and reads them in a way that cannot fault. Such memory may have been freed and used
 * again. So what was read may only decide whether a message is redirected, never to which socket:
 * the redirect itself finds the peer by its unique key, or fails.
 *
 * OFF_*, MASK_* and BIT_* are places of struct members, from the running kernel's BTF
 * (bpf/loader.py).
 */

/* Two helpers under other names. bcc turns bpf_probe_read_kernel into bpf_probe_read, which
 * sock_ops may not call where it sees no kernel symbols. And it declares bpf_get_socket_cookie to
 * return 32 bits of the cookie's 64. */
static long (*tb_probe_read_kernel)(void *to, __u32 size,
				    const void *from) = (void *)BPF_FUNC_probe_read_kernel;
static __u64 (*tb_socket_cookie)(void *context) = (void *)BPF_FUNC_get_socket_cookie;
static void *(*tb_sock_from_file)(void *file) = (void *)BPF_FUNC_sock_from_file;
/* The time of the last tick, in nanoseconds: cheaper than bpf_ktime_get_ns(). An iterator may ask
 * only for the latter. The two clocks are one, up to a tick: tb_has_passed(). */
static __u64 (*tb_tick_ns)(void) = (void *)BPF_FUNC_ktime_get_coarse_ns;

#define __always_inline inline __attribute__((always_inline))

#define NS_PER_S 1000000000ULL
#define AF_INET 2
#define AF_INET6 10
#define O_NONBLOCK 04000

/* A member of the socket that the program runs for, from its struct tcp_sock: a plain load. */
#define TB_OWN(type, tp, offset) (*(volatile type *)((tp) + (offset)))

#ifdef TB_RDONLY_CAST
/* bpf_rdonly_cast(), Linux 6.2: through what it returns any kernel memory is read by a plain load,
 * and a fault reads as zero. The type only limits how far the load may reach. */
static const void *(*tb_rdonly_cast)(__u64 address, __u32 type) = (void *)TB_RDONLY_CAST;

#define TB_TCP_SOCK(sk, address) tb_rdonly_cast(address, TB_ID_TCP_SOCK)
#define TB_READ(type, address) (*(const volatile type *)tb_rdonly_cast(address, TB_ID_TIMESPEC64))
#else
#define TB_TCP_SOCK(sk, address) bpf_skc_to_tcp_sock(sk)
#define TB_READ(type, address)                                                                     \
	({                                                                                         \
		type value = 0;                                                                    \
		tb_probe_read_kernel(&value, sizeof(value), (void *)(address));                    \
		value;                                                                             \
	})
#endif

#define tb_read64(address) TB_READ(__u64, address)
#define tb_read32(address) TB_READ(__u32, address)
#define tb_read8(address) TB_READ(__u8, address)

static __always_inline int tb_has_passed(__u64 ns, __u64 since, __u64 now)
{
	return (__s64)(now - since) >= (__s64)ns;
}

static __always_inline __u32 tb_min(__u32 a, __u32 b)
{
	return a < b ? a : b;
}

/* The socket that a sock_ops callback is for, also a request socket, which skops->sk hides: the
 * kernel's own view of the context (struct bpf_sock_ops_kern) has it. */
static __always_inline __u64 tb_context_sock(struct bpf_sock_ops *skops)
{
	__u64 sk = 0;

	tb_probe_read_kernel(&sk, sizeof(sk), (void *)skops + OFF_SOCK_OPS_SK);
	return sk;
}

static __always_inline __u8 tb_tcp_state(__u64 sk)
{
	return tb_read8(sk + OFF_SOCK_STATE);
}

/* The struct sk_psock * of a socket that is in a sockhash. */
static __always_inline __u64 tb_psock(__u64 sk)
{
	return tb_read64(sk + OFF_SOCK_USER_DATA) & ~7ULL;
}

/* References to a struct sk_psock: one is the sockhash's, one each thread's inside a call. */
static __always_inline __u32 tb_psock_refs(__u64 psock)
{
	return tb_read32(psock + OFF_PSOCK_REFCNT);
}

/* Do no bypassed bytes lie unread in a psock? Its queue is empty when the list points to itself. */
static __always_inline int tb_is_empty(__u64 psock)
{
	return tb_read64(psock + OFF_PSOCK_INGRESS_MSG) == psock + OFF_PSOCK_INGRESS_MSG;
}

/* The socket's open file, 0 before accept(2) and after close(2). One socket has one file. */
static __always_inline __u64 tb_file(__u64 sk)
{
	__u64 socket = tb_read64(sk + OFF_SOCK_SOCKET);

	return socket ? tb_read64(socket + OFF_SOCKET_FILE) : 0;
}
