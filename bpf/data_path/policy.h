/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Addresses, pods, ports, hops: which connections the operator and the pods want bypassed.
 */

static __always_inline int tb_addr_equal(const struct tb_addr *a, const struct tb_addr *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

/* Addresses that mean another socket in each network namespace: 127.0.0.0/8, and ::/120 with ::1
 * and the ::6 that Istio gives to loopback. */
static __always_inline int tb_addr_is_local(const struct tb_addr *a)
{
	if (a->word[0] || a->word[1])
		return 0;
	if (a->word[2] == bpf_htonl(0xffff))
		return (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000);
	return !a->word[2] && (a->word[3] & bpf_htonl(0xffffff00)) == 0;
}

static __always_inline int tb_is_proxy(__u64 sk, const struct tb_pod *pod)
{
	return tb_read32(sk + OFF_SOCK_UID) == pod->proxy_uid;
}

static __always_inline int tb_pod_owns(const struct tb_pod *pod, const struct tb_addr *a)
{
	int i;

#pragma unroll
	for (i = 0; i < TB_MAX_IPS; i++)
		if (i < pod->ip_count && tb_addr_equal(&pod->ip[i], a))
			return 1;
	return 0;
}

static __always_inline int tb_pod_excludes(const struct tb_pod *pod, __u32 port)
{
	int i;

#pragma unroll
	for (i = 0; i < TB_MAX_PORT_RANGES; i++)
		if (i < pod->excluded_count && port >= pod->excluded[i].first &&
		    port <= pod->excluded[i].last)
			return 1;
	return 0;
}

/* Keeps a context load where it stands: clang would merge the loads of two branches into one
 * through a computed context pointer, which the verifier refuses. */
#define TB_PIN(value) asm volatile("" : "+r"(value))

static __always_inline void tb_addr_select(__u32 family, __u32 v4, __u32 w0, __u32 w1, __u32 w2,
					   __u32 w3, struct tb_addr *addr)
{
	if (family == AF_INET) {
		w0 = w1 = 0;
		w2 = bpf_htonl(0xffff);
		w3 = v4;
	}
	addr->word[0] = w0;
	addr->word[1] = w1;
	addr->word[2] = w2;
	addr->word[3] = w3;
}

/* The address of one end, `local` or `remote`, of the socket that a callback is for. Each load is
 * kept where it stands, as by TB_PIN. */
#define TB_ADDR(skops, end, addr)                                                                  \
	({                                                                                         \
		__u32 v4 = (skops)->end##_ip4;                                                     \
		__u32 w0 = (skops)->end##_ip6[0], w1 = (skops)->end##_ip6[1];                      \
		__u32 w2 = (skops)->end##_ip6[2], w3 = (skops)->end##_ip6[3];                      \
		asm volatile("" : "+r"(v4), "+r"(w0), "+r"(w1), "+r"(w2), "+r"(w3));               \
		tb_addr_select((skops)->family, v4, w0, w1, w2, w3, addr);                         \
	})

/* The port of the other end, in host byte order. */
static __always_inline __u32 tb_remote_port(struct bpf_sock_ops *skops)
{
	__u32 port = skops->remote_port;

	TB_PIN(port);
	return bpf_ntohl(port);
}

static __always_inline __u64 tb_netns_of(__u64 sk)
{
	return tb_read64(sk + OFF_SOCK_NET);
}

/* Is a socket in the network namespace that ADD has configured? A pod can make more. */
static __always_inline int tb_is_in_netns_of(const struct tb_pod *pod, __u64 sk)
{
	return !pod->netns || pod->netns == tb_read32(tb_netns_of(sk) + OFF_NET_NS_INODE);
}

static __always_inline __u32 tb_hop(const struct tb_conn *conn)
{
	const struct tb_end *me = &conn->me, *peer = &conn->peer;

	if (!peer->id)
		return TB_HOP_NONE;
	if (me->pod_id != peer->pod_id)
		return me->is_proxy && peer->is_proxy ? TB_HOP_SIDECARS : TB_HOP_DIRECT;
	if (me->is_proxy == peer->is_proxy)
		return TB_HOP_LOCAL;
	/* One end is a sidecar: the client, or the server? */
	return me->is_proxy == me->is_client ? TB_HOP_INBOUND : TB_HOP_OUTBOUND;
}
