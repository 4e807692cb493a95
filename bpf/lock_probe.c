// SPDX-License-Identifier: GPL-2.0-only
/*
 * Does an iterator's visit hold the lock of the socket, as lock_sock() takes it? Only reads.
 * COOKIE is that of an idle socket; OFF_SOCK_LOCK_OWNED is from the kernel's BTF.
 */
#include <uapi/linux/bpf.h>

static long (*probe_read_kernel)(void *to, __u32 size,
				 const void *from) = (void *)BPF_FUNC_probe_read_kernel;
static __u64 (*socket_cookie)(void *socket) = (void *)BPF_FUNC_get_socket_cookie;

/* 0: how often the socket was visited; 1: its sk_lock.owned. */
BPF_ARRAY(found, __u64, 2);

struct bpf_iter_meta;
struct sock_common;
struct bpf_iter__tcp {
	struct bpf_iter_meta *meta;
	struct sock_common *sk_common;
	unsigned int uid;
};

int bpf_iter__tcp(struct bpf_iter__tcp *context)
{
	struct sock_common *sk = context->sk_common;
	int zero = 0, one = 1;
	__u32 owned = 0;
	__u64 *visits, *result;

	if (!sk || socket_cookie(sk) != COOKIE)
		return 0;
	probe_read_kernel(&owned, sizeof(owned), (char *)sk + OFF_SOCK_LOCK_OWNED);
	visits = found.lookup(&zero);
	result = found.lookup(&one);
	if (visits && result) {
		(*visits)++;
		*result = owned;
	}
	return 0;
}
