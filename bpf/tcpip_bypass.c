// SPDX-License-Identifier: GPL-2.0-only
/*
 * The data path. Two programs share the maps below:
 *
 *   tb_sock_ops  runs for every TCP socket of an accelerated pod's cgroup when a connection
 *                is set up or closed. It finds the two sockets that are one connection and
 *                puts them, and no others, into the sockhash.
 *   tb_sk_msg    runs for every message sent on a socket in the sockhash, and decides whether
 *                its bytes go straight to the peer (bypass) or by TCP.
 *
 * Compiled on the node by bcc. OFF_* and friends are offsets of kernel struct members, taken
 * from the running kernel's BTF (bpf/btf.py). docs/architecture.md tells the whole story; the
 * rules that keep the bytes right stand where they are applied, each marked RULE.
 */
#include <uapi/linux/bpf.h>
#include "tcpip_bypass.h"

/*
 * Two helpers under names of our own. bcc turns bpf_probe_read_kernel into bpf_probe_read, which
 * sock_ops may not call, where it sees no kernel symbols (kptr_restrict, no CAP_SYSLOG). And it
 * declares bpf_get_socket_cookie to return 32 bits of the cookie's 64.
 */
static long (*tb_probe_read_kernel)(void *to, __u32 size,
				    const void *from) = (void *)BPF_FUNC_probe_read_kernel;
static __u64 (*tb_socket_cookie)(void *context) = (void *)BPF_FUNC_get_socket_cookie;

#define __always_inline inline __attribute__((always_inline))

#define AF_INET 2
#define AF_INET6 10
#define SOL_SOCKET 1
#define SO_KEEPALIVE 9
#define SOL_TCP 6
#define TCP_KEEPIDLE 4
#define TCP_KEEPINTVL 5
#define TCP_CONGESTION 13
#define TCP_ESTABLISHED 1 /* net/tcp_states.h */
#define TCP_INIT_CWND 10  /* packets; net/tcp.h */
#define EBUSY 16
#define O_NONBLOCK 04000

/* An id is the socket's cookie and, in its low bits, how often the socket has joined before. */
#define TB_ID_SHIFT 16
#define TB_MANY (~0ULL)
/* The epoch of a tx_mark for which no rx_mark of the peer's was the reason. */
#define TB_SEEN 0xffffffffULL
/* How many bytes, at most, go on bypassing while there is no good moment to leave. */
#define TB_MAX_OVERDUE (512 * 1024)
#define TB_SHORT_OVERDUE (64 * 1024) /* the same, for want of memory at the peer */
/* So much a sidecar's TCP is spared besides; and a bound that would be smaller is none. See
 * tb_bound(). */
#define TB_SPARED (64 * 1024)
/* A container is left this part of its memory limit, or TB_AMPLE pages, and each connection takes
 * at most that part of what is free besides. So many cgroups above one another are looked at. See
 * tb_room(). */
#define TB_RESERVE 16
#define TB_SHARE 16
#define TB_AMPLE (TB_SHARE * TB_MAX_BOUND / TB_PAGE_SIZE)
#define TB_LEVELS 4
/* What the kernel allocates for a redirected message besides its bytes (struct sk_msg). */
#define TB_MESSAGE_COST 1024
/* A wait queue with more entries than this is not walked: the socket counts as being read. */
#define TB_MAX_WAITERS 8
#define TB_MAX_PAUSED_PODS 4096
/*
 * What TCP would gather: writes below TB_SMALL bytes, TB_CROWD of them while earlier ones lay
 * unread, as when both ends share a CPU (TB_LARGE_CROWD where only a held window gathers, so that a
 * reader without a CPU for a moment does not cost a busy connection its bypass); one that finds the
 * peer's queue moving makes up for TB_RELIEF. And what gains nothing: TB_STUCK more by TCP, by the
 * order rule, than bypassed; where TCP may be the faster one for a while only, TB_STUCK_LONG. See
 * tb_should_part(), tb_weight().
 */
#define TB_SMALL 8192
#define TB_CROWD 256
#define TB_LARGE_CROWD 1024
#define TB_RELIEF 32
#define TB_STUCK 4096
#define TB_STUCK_LONG (128 * TB_STUCK)
/* A peer's queue that moves is looked at once in so many bytes, counted with what holds them. */
#define TB_LOOK 16384
/* So much a peer may leave unread at most, however large its buffers are. See tb_bound(). */
#define TB_MAX_BOUND (2 << 20)
/* How much TCP may have on its way inside a pod, in bytes and in packets, whichever is more; for
 * writes of TB_BULK and more only in large packets. See tb_best_window(). */
#define TB_IN_FLIGHT (512 * 1024)
#define TB_FEW_PACKETS 16
#define TB_BULK (128 * 1024)
/* An acknowledgement that took so long was waited for, in microseconds; the delay is 40,000. Then
 * more packets may be on their way, so many in the end. There it may happen so often, and once more
 * for each so many bytes; without them it counts for several. See tb_count_waits(). */
#define TB_LATE 5000
#define TB_WIDENINGS 4
#define TB_MANY_PACKETS (TB_FEW_PACKETS << TB_WIDENINGS)
#define TB_WAITS 64
#define TB_WAIT_BYTES (256 * 1024)
#define TB_OWN_WINDOW (~0U) /* TCP's own limit; what we set for it is another number */
#define TB_ANY_WINDOW 0x7fffffff
/* Smaller writes are read, and acknowledged, one by one: they gather in few packets only. */
#define TB_TINY 128
/* Streams whose acknowledgements are for fewer bytes, so many in a row, go better where TCP paces
 * them; and so does what the order rule keeps on TCP once it is 256 small messages more than it is
 * large ones, as tb_weight() counts them. See tb_pace_not(), tb_is_fine(). */
#define TB_FINE 16384
#define TB_FINE_ACKS 512
#define TB_FINE_WAITS 512
#define TB_CONTROL_NAME 16 /* bytes: TCP_CA_NAME_MAX */
/* How long, in jiffies, a step of parting lasts at least: see tb_take_leave(). */
#define TB_PARTING_STEP 2

/* ---- What the two ends of one connection know of each other ---------------------------- */

/* One end. Kernel addresses are numbers here: they are only ever read through
 * tb_read*, which cannot fault. */
struct tb_end {
	__u64 id;    /* key of the sockhash, see tb_new_id(); 0: nobody */
	__u64 sk;    /* struct sock * */
	__u64 psock; /* struct sk_psock * */
	__u64 conn;  /* struct tb_conn * */
	__u64 prot;  /* struct proto *, the one it has in the sockhash */
	__u64 pod_id;
	__u32 is_proxy;
	__u32 reserved;
};

/*
 * RULE (identity). Two sockets are one connection only if their initial sequence numbers
 * mirror: two 32-bit numbers that the kernel drew for this connection. Addresses do not decide:
 * iptables REDIRECT changes the server's, NAT the client's port, client ports are reused at
 * once, and 127.0.0.1:p -> 127.0.0.1:8080 is the same tuple in every pod. Nor do the numbers
 * alone: they are a hash of the tuple under one secret per boot, plus a clock
 * (net/core/secure_seq.c), so that the same tuple draws the same numbers in two network
 * namespaces at the same moment. Hence `netns`; 0 for a client address that ADD recorded for
 * one pod, which is unique on the node.
 */
struct tb_half_key {
	struct tb_addr client;
	__u64 netns;	  /* struct net *, where `client` is an address that every namespace has */
	__u32 client_isn; /* sequence number of the client's first data byte */
	__u32 server_isn;
};

/* A connection that is being set up: announced, then joined by the client, then the server. */
struct tb_half {
	struct tb_end client;	/* id 0: has not joined */
	struct tb_end server;	/* id 0: has not joined; pod_id: who has announced it */
	__u64 server_netns;	/* struct net *, of the listener */
	struct tb_addr dialled; /* where the client meant to go */
	__u32 dialled_port;	/* host byte order */
	__u32 vouched;		/* the SYN-ACK had the announcing pod's token, see tb_token() */
};

/* A connect of a pod that dials Services: its SYN is about to go out. */
struct tb_dial {
	struct tb_addr client;
	__u32 client_isn;
	__u32 reserved;
};

/* A TCP option for experiments (RFC 6994), in SYN-ACKs between two accelerated pods of one node. */
struct tb_option {
	__u8 kind;
	__u8 length;
	__u8 id[2];
	__u8 token[8];
};

#define TB_OPTION_KIND 253
#define TB_OPTION_ID                                                                               \
	{                                                                                          \
		't', 'b'                                                                           \
	}

/* How a socket leaves the sockhash for good, see tb_take_leave(). */
enum tb_parting {
	TB_STAYING,
	TB_PARTING, /* redirects nothing any more, and asks its peer to do the same */
	TB_CLOSED,  /* whoever looks from now on must not redirect to it */
	TB_PARTED,  /* not in the sockhash any more: plain TCP */
};

/* One socket in the sockhash. Written by its owner alone, under its own socket lock; the
 * peer reads `rx_mark`, and `parting` when it has reason to. */
struct tb_conn {
	/*
	 * "All my peer's TCP bytes below sequence number (u32)rx_mark were consumed, and nobody
	 * was inside a read of TCP bytes": (epoch << 32 | sequence number), 0 for never. One
	 * aligned word, so that the peer never sees half of it.
	 */
	__u64 rx_mark;
	__u64 tx_mark;	/* the peer's rx_mark on which this end bypasses; 0: it sends by TCP */
	__u64 tx_dead;	/* an rx_mark of the peer's that must not be believed any more */
	__u64 queued;	/* bytes redirected since the peer's queue was last seen empty */
	__u64 look_at;	/* at how many of them to look again */
	__u64 writer;	/* the one thread that made all redirects since tb_alone(), or TB_MANY */
	__u64 overdue;	/* how long it has been going on bypassing though it should not */
	__u64 pressure; /* unsigned long *, set while TCP is short of memory */
	__u64 last_id;	/* the newest id this socket has had, kept over a disconnect */
	__u64 messages; /* bypassed, not yet in the counters */
	__u64 bytes;
	__u64 tallied_at; /* jiffies */
	__u64 stepped_at; /* jiffies of the last step of parting */
	__u64 steps;	  /* all sockets' steps of parting, when this end last heard of one */
	__u64 oldest;	  /* struct sk_msg * at the head of the peer's queue, as last seen */
	__u32 parting;	  /* enum tb_parting */
	__u32 wary;	  /* the peer has taken a step: look at each message, and part as well */
	__u32 small;	  /* messages that TCP might coalesce, since the last look */
	__u32 crowd;	  /* how much this looks like a stream that TCP would gather */
	__u32 stuck;	  /* how much more the order rule has kept on TCP than was bypassed */
	__u32 waiting;	  /* the same of small messages */
	__u32 scarce;	  /* the same that the peer's container had no memory for */
	__u32 bound;	  /* how much the peer may leave unread, at the last look */
	__u32 first;	  /* the sequence number of the first byte that this end sends */
	__u32 hop;
	__u32 seeking; /* a client that has not found its server yet, but may */
	__u32 called;  /* the flags of TB_WHILE_JOINED that no other program had set */
	__u32 held;    /* the congestion window, in packets, see tb_best_window(); 0: TCP's own */
	__u32 size;    /* of the newest message */
	__u32 srtt;    /* at the last acknowledgement, in microseconds */
	__u32 is_limited; /* by the window, at the last acknowledgement */
	__u32 wider;	  /* how often the window was doubled, see tb_count_waits() */
	__u32 waits;	  /* for acknowledgements, in the widest window */
	__u32 waited_at;  /* the sequence number of the last of them */
	__u32 acks;	  /* since the sequence number `acked_at`, on its way out of the sockhash */
	__u32 acked_at;
	char paced_by[TB_CONTROL_NAME]; /* the congestion control that Reno stands in for, or "" */
	struct tb_end me;
	struct tb_end peer; /* id 0: not paired */
	struct tb_half_key half;
};

/* What only the kernel's own programs know. */
struct tb_secret {
	__u64 key[2];
};

/* ---- Maps ------------------------------------------------------------------------------ */

BPF_CGROUP_STORAGE(pods, struct tb_pod);
BPF_SK_STORAGE(conns, struct tb_conn);
BPF_SOCKHASH(sockhash, __u64, TB_MAX_SOCKETS);
BPF_F_TABLE("lru_hash", struct tb_half_key, struct tb_half, halves, TB_MAX_PENDING, 0);
BPF_F_TABLE("lru_hash", struct tb_dial, __u32, dials, TB_MAX_PENDING, 0);
BPF_ARRAY(secret, struct tb_secret, 1); /* drawn anew by each load */
BPF_F_TABLE("percpu_hash", struct tb_counter_key, struct tb_counters, counters, TB_MAX_COUNTERS,
	    BPF_F_NO_PREALLOC);
BPF_ARRAY(no_counters, struct tb_counters, 1); /* zeros, too many for the stack */
BPF_ARRAY(control, struct tb_control, 1);
BPF_ARRAY(steps, __u64, 1); /* of parting, that any socket has taken */
BPF_F_TABLE("hash", __u64, __u32, paused_pods, TB_MAX_PAUSED_PODS, BPF_F_NO_PREALLOC);

static __always_inline __u32 tb_min(__u32 a, __u32 b)
{
	return a < b ? a : b;
}

/* ---- Reading kernel memory ------------------------------------------------------------- */

/* A member of the socket that this program runs for, from its struct tcp_sock pointer: a plain
 * load on any kernel. Other memory goes through tb_read*, which costs 33 ns before 6.2. */
#define TB_OWN(type, tp, offset) (*(volatile type *)((tp) + (offset)))

#ifdef TB_RDONLY_CAST
/* bpf_rdonly_cast(), of Linux 6.2: through what it returns any kernel memory is read by a plain
 * load, whose fault reads as zero. The type only says how far it may reach, and the call itself
 * costs nothing. */
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

static __always_inline __u64 tb_read64(__u64 address)
{
	return TB_READ(__u64, address);
}

static __always_inline __u32 tb_read32(__u64 address)
{
	return TB_READ(__u32, address);
}

static __always_inline __u8 tb_read8(__u64 address)
{
	return TB_READ(__u8, address);
}

/* The address of the socket that a callback is for, request sockets included, which skops->sk
 * hides: the kernel's own view of the context (struct bpf_sock_ops_kern) has it. */
static __always_inline __u64 tb_context_sock(struct bpf_sock_ops *skops)
{
	__u64 sk = 0;

	tb_probe_read_kernel(&sk, sizeof(sk), (void *)skops + OFF_SOCK_OPS_SK);
	return sk;
}

/* MPTCP: the kernel oopsed on subflows in a sockhash (fixed late in 2025). ULP: kTLS would
 * redirect plaintext. SO_ZEROCOPY: the completion the sender waits for would never come. */
static __always_inline int tb_ineligible(__u64 sk)
{
	return (tb_read8(sk + OFF_TCP_SOCK_IS_MPTCP) & MASK_TCP_SOCK_IS_MPTCP) ||
	       tb_read64(sk + OFF_ICSK_ULP_OPS) ||
	       (tb_read64(sk + OFF_SOCK_FLAGS) & (1ULL << BIT_SOCK_ZEROCOPY));
}

/*
 * Is any thread asleep in a system call on this socket? A sleeper in recv, send, connect or
 * poll has its wait_queue_entry.private set (to its task or poll table); epoll does not sleep
 * here, and leaves it NULL (init_waitqueue_func_entry); so does io_uring before 5.19. Errs
 * towards yes.
 */
static __always_inline int tb_has_sleeper(__u64 sk)
{
	__u64 wq = tb_read64(sk + OFF_SOCK_WQ);
	__u64 head, entry;
	int i;

	if (!wq) /* not accepted yet: nobody can have it open */
		return 0;
	head = wq + OFF_SOCKET_WQ_HEAD;
	entry = tb_read64(head);
#pragma unroll
	for (i = 0; i < TB_MAX_WAITERS; i++) {
		if (entry == head)
			return 0;
		if (!entry || tb_read64(entry - OFF_WAIT_ENTRY + OFF_WAIT_PRIVATE))
			return 1;
		entry = tb_read64(entry);
	}
	return 1;
}

/* The struct sk_msg * at the head of an end's bypass queue, or the queue itself if it is empty. */
static __always_inline __u64 tb_oldest(const struct tb_end *end)
{
	return tb_read64(end->psock + OFF_PSOCK_INGRESS_MSG);
}

static __always_inline int tb_is_empty(const struct tb_end *end, __u64 oldest)
{
	return oldest == end->psock + OFF_PSOCK_INGRESS_MSG;
}

/* Does nothing that came by bypass lie unread at this end? */
static __always_inline int tb_has_read_all(const struct tb_end *end)
{
	return tb_is_empty(end, tb_oldest(end));
}

static __always_inline int tb_paused(struct tb_conn *conn)
{
	int zero = 0;
	struct tb_control *node = control.lookup(&zero);

	if (!node || (node->flags & TB_CONTROL_PAUSED))
		return 1;
	return (node->flags & TB_CONTROL_PODS_PAUSED) &&
	       (paused_pods.lookup(&conn->me.pod_id) || paused_pods.lookup(&conn->peer.pod_id));
}

/* ---- Addresses and policy -------------------------------------------------------------- */

static __always_inline int tb_addr_equal(const struct tb_addr *a, const struct tb_addr *b)
{
	return a->word[0] == b->word[0] && a->word[1] == b->word[1] && a->word[2] == b->word[2] &&
	       a->word[3] == b->word[3];
}

/* Addresses that mean another socket in each network namespace: 127.0.0.0/8, ::1, and the
 * ::6 that Istio gives to loopback. */
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

static __always_inline int tb_addr_select(__u32 family, __u32 v4, __u32 w0, __u32 w1, __u32 w2,
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
	return family == AF_INET || family == AF_INET6;
}

/* The address of one end, `local` or `remote`, of the socket that a callback is for. */
#define TB_ADDR(skops, end, addr)                                                                  \
	({                                                                                         \
		__u32 v4 = (skops)->end##_ip4;                                                     \
		__u32 w0 = (skops)->end##_ip6[0], w1 = (skops)->end##_ip6[1];                      \
		__u32 w2 = (skops)->end##_ip6[2], w3 = (skops)->end##_ip6[3];                      \
		TB_PIN(v4);                                                                        \
		TB_PIN(w0);                                                                        \
		TB_PIN(w1);                                                                        \
		TB_PIN(w2);                                                                        \
		TB_PIN(w3);                                                                        \
		tb_addr_select((skops)->family, v4, w0, w1, w2, w3, addr);                         \
	})

/* The namespace part of a key, see struct tb_half_key; sk may be a request socket. */
static __always_inline __u64 tb_netns(const struct tb_addr *client, __u64 sk)
{
	return tb_addr_is_local(client) ? tb_read64(sk + OFF_SOCK_NET) : 0;
}

static __always_inline __u32 tb_hop(const struct tb_end *client, const struct tb_end *server)
{
	if (client->pod_id != server->pod_id)
		return client->is_proxy && server->is_proxy ? TB_HOP_SIDECARS : TB_HOP_DIRECT;
	if (client->is_proxy == server->is_proxy)
		return TB_HOP_LOCAL;
	return client->is_proxy ? TB_HOP_INBOUND : TB_HOP_OUTBOUND;
}

/* ---- Counters -------------------------------------------------------------------------- */

static __always_inline struct tb_counters *tb_counters_of(__u64 pod_id, __u32 hop)
{
	struct tb_counter_key key = {.pod_id = pod_id, .hop = hop};

	return counters.lookup(&key);
}

/* Only here are a pod's counters created: messages of a pod that was DELed must not. */
static __always_inline void tb_count_outcome(__u64 pod_id, __u32 hop, __u32 outcome)
{
	struct tb_counter_key key = {.pod_id = pod_id, .hop = hop};
	struct tb_counters *c = counters.lookup(&key), *none;
	int zero = 0;

	if (!c) {
		none = no_counters.lookup(&zero);
		if (none)
			counters.insert(&key, none);
		c = counters.lookup(&key);
	}
	if (c && outcome < TB_OUTCOMES)
		c->connections[outcome]++;
}

/* Bypassed messages are tallied in the socket's own storage and carried over at most once per
 * tick: the lookup would be a tenth of what a message costs here. */
static __always_inline void tb_flush_tally(struct tb_conn *conn)
{
	struct tb_counters *c;

	if (!conn->messages)
		return;
	c = tb_counters_of(conn->me.pod_id, conn->hop);
	if (c) {
		c->bypassed_messages += conn->messages;
		c->bypassed_bytes += conn->bytes;
	}
	conn->messages = 0;
	conn->bytes = 0;
}

/* ---- Joining the sockhash -------------------------------------------------------------- */

/*
 * RULE (conntrack). A bypassed connection sends no packets, so its NAT entry would expire and
 * the close would never arrive. Keepalive below the namespaces' timeouts keeps it alive. An
 * application's own keepalive times are left alone.
 */
static __always_inline void tb_keep_alive(struct bpf_sock_ops *skops, const struct tb_pod *pod,
					  __u64 sk)
{
	int seconds = pod->keepalive_s, on = 1;

	if (!seconds || tb_read32(sk + OFF_TCP_SOCK_KEEPALIVE_TIME))
		return;
	bpf_setsockopt(skops, SOL_TCP, TCP_KEEPIDLE, &seconds, sizeof(seconds));
	bpf_setsockopt(skops, SOL_TCP, TCP_KEEPINTVL, &seconds, sizeof(seconds));
	bpf_setsockopt(skops, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof(on));
}

/*
 * RULE (identity). The key under which this connection's end is found: unique for the life of
 * the kernel. Not the socket's cookie alone: a socket that disconnects (AF_UNSPEC) and connects
 * again keeps it, and an old peer that never heard of that would reach the new connection.
 * 0 when this socket has used up its keys.
 */
static __always_inline __u64 tb_new_id(struct bpf_sock_ops *skops, const struct tb_conn *conn)
{
	__u64 first = tb_socket_cookie(skops) << TB_ID_SHIFT;
	__u64 next = conn->last_id + 1;

	if (!conn->last_id)
		return first;
	return next >> TB_ID_SHIFT == first >> TB_ID_SHIFT ? next : 0;
}

/* The count of `steps`, which the verifier wants to see tested. */
static __always_inline __u64 *tb_steps(void)
{
	int zero = 0;

	return steps.lookup(&zero);
}

/*
 * Puts the socket of this callback, which lies at `address`, into the sockhash. Returns its
 * tb_conn with `me` filled in, or NULL with the reason in *outcome, and then the socket is what
 * it was.
 */
static __always_inline struct tb_conn *tb_join(struct bpf_sock_ops *skops, const struct tb_pod *pod,
					       __u64 address, __u32 *outcome)
{
	struct bpf_sock *sk = skops->sk;
	struct tb_conn *conn;
	__u64 id, *count;
	int err;

	*outcome = TB_OUTCOME_FULL;
	if (!sk)
		return NULL;
	conn = conns.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!conn)
		return NULL;
	id = tb_new_id(skops, conn);
	if (!id)
		return NULL;
	__builtin_memset(conn, 0, sizeof(*conn));
	conn->last_id = id;
	conn->first = skops->snd_nxt;
	count = tb_steps();
	conn->steps = count ? *count : 0;
	conn->me.sk = address;
	conn->pressure = tb_read64(tb_read64(address + OFF_SOCK_PROT) + OFF_PROTO_MEMORY_PRESSURE);
	if (tb_ineligible(address)) {
		*outcome = TB_OUTCOME_INELIGIBLE;
		return NULL;
	}
	conn->me.is_proxy = tb_is_proxy(address, pod);
	if ((pod->flags & TB_POD_PROXY_ONLY) && !conn->me.is_proxy) {
		*outcome = TB_OUTCOME_EXCLUDED;
		return NULL;
	}
#ifdef TB_DRY_RUN /* the self-test asks who would join */
	return NULL;
#endif
	/* Another program's sockmap owns it already: the kernel would let us share. */
	err = tb_read64(address + OFF_SOCK_USER_DATA)
		      ? -EBUSY
		      : sockhash.sock_hash_update(skops, &id, BPF_NOEXIST);
	if (err) {
		*outcome = err == -EBUSY ? TB_OUTCOME_BUSY : TB_OUTCOME_FULL;
		return NULL;
	}
	conn->me.id = id;
	conn->me.psock = tb_read64(address + OFF_SOCK_USER_DATA) & ~7ULL;
	conn->me.prot = tb_read64(address + OFF_SOCK_PROT);
	conn->me.conn = (__u64)conn;
	conn->me.pod_id = pod->id;
	return conn;
}

/* What a socket is called for while it is in the sockhash, and bytes of its go by TCP: when some
 * are acknowledged, and when it sends a packet. */
#define TB_WHILE_JOINED (BPF_SOCK_OPS_RTT_CB_FLAG | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG)

static __always_inline void tb_call_on(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	conn->called = TB_WHILE_JOINED & ~skops->bpf_sock_ops_cb_flags;
	bpf_sock_ops_cb_flags_set(skops, skops->bpf_sock_ops_cb_flags | TB_WHILE_JOINED |
						 BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* One that sends by TCP in another way than its own is called for that, wherever it is. */
static __always_inline int tb_is_shaped(const struct tb_conn *conn)
{
	return conn->held || conn->paced_by[0];
}

static __always_inline void tb_call_no_more(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	int over = conn->called;

	if (tb_is_shaped(conn))
		over &= ~BPF_SOCK_OPS_RTT_CB_FLAG;
	bpf_sock_ops_cb_flags_set(skops, skops->bpf_sock_ops_cb_flags & ~over);
	conn->called &= ~over;
}

static __always_inline int tb_is_called(const char *control, char a, char b, char c)
{
	return control[0] == a && control[1] == b && control[2] == c;
}

/*
 * BBR paces what it sends, by a timer, for a network's sake. Inside a pod there is none, and larger
 * writes are two to four times as fast without. So Reno, which every kernel has, stands in for it,
 * before it has begun; unless somebody has chosen it for this very socket.
 *
 * The kernel is about to make the send buffer for the first window: twice as large, or three times
 * under BBR (tcp_sndbuf_expand). An application may count on it, when it writes before it reads. So
 * the window begins half as large again; if it can, and be held. The buffer is never made for fewer
 * than TCP_INIT_CWND, with which a window begins only after lost SYNs, or where the route says so.
 */
static __always_inline void tb_pace_not(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	__u32 own = skops->snd_cwnd, first = own * 3 / 2;
	char reno[] = "reno";

	if (tb_paused(conn) || own < TCP_INIT_CWND || first > TB_FEW_PACKETS ||
	    (tb_read8(conn->me.sk + OFF_ICSK_CA_SETSOCKOPT) & MASK_ICSK_CA_SETSOCKOPT))
		return;
	bpf_getsockopt(skops, SOL_TCP, TCP_CONGESTION, conn->paced_by, sizeof(conn->paced_by));
	if (tb_is_called(conn->paced_by, 'b', 'b', 'r') &&
	    !bpf_setsockopt(skops, SOL_TCP, TCP_BPF_IW, &first, sizeof(first))) {
		if (!bpf_setsockopt(skops, SOL_TCP, TCP_CONGESTION, reno, sizeof(reno)))
			return;
		bpf_setsockopt(skops, SOL_TCP, TCP_BPF_IW, &own, sizeof(own));
	}
	conn->paced_by[0] = 0;
}

/* Its own congestion control again, if nobody has chosen another one meanwhile. */
static __always_inline void tb_pace_again(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	char control[TB_CONTROL_NAME] = {};

	if (!conn->paced_by[0])
		return;
	bpf_getsockopt(skops, SOL_TCP, TCP_CONGESTION, control, sizeof(control));
	if (tb_is_called(control, 'r', 'e', 'n'))
		bpf_setsockopt(skops, SOL_TCP, TCP_CONGESTION, conn->paced_by,
			       sizeof(conn->paced_by));
	conn->paced_by[0] = 0;
}

/*
 * RULE (order, wake-up). Says "from here on I read whatever comes by bypass". True when every
 * byte the peer sent by TCP so far is consumed AND no thread is inside tcp_recvmsg, where it
 * would have taken part of what MSG_WAITALL or SO_RCVLOWAT makes it wait for and then sleep
 * through bypassed bytes. This runs under this socket's lock, so such a thread can only be
 * asleep on the wait queue (sk_wait_data stays on it until it has the lock back); a thread
 * that enters recv later finds an empty TCP queue and waits in tcp_bpf_recvmsg, for both.
 */
static __always_inline void tb_mark_consumed(struct tb_conn *conn, __u32 seq)
{
	__u64 epoch = conn->rx_mark >> 32;

	if (epoch && (__u32)conn->rx_mark == seq)
		return;
	if ((int)tb_read32(conn->me.sk + OFF_SOCK_RCVLOWAT) > 1 || tb_has_sleeper(conn->me.sk))
		return;
	conn->rx_mark = (epoch + 1 < TB_SEEN ? epoch + 1 : 1) << 32 | seq;
}

/* What a request socket and its SYN tell of the key; `netns` is not in it. */
static __always_inline int tb_requested(struct bpf_sock_ops *skops, __u64 request,
					struct tb_half_key *key)
{
	key->client_isn = tb_read32(request + OFF_TCP_REQUEST_RCV_ISN) + 1;
	key->server_isn = tb_read32(request + OFF_TCP_REQUEST_SNT_ISN) + 1;
	return TB_ADDR(skops, remote, &key->client);
}

/*
 * A SYN has reached a listener of this pod, and the SYN-ACK is about to go out. What the two ends
 * will know of each other is known already, so the connection is announced to its client, which
 * is established first: a socket whose peer is no accelerated socket of this node must stay out
 * of the sockhash, where even plain TCP is slower.
 *
 * The listener decides for its connections. One with MPTCP above all: when it falls back to TCP,
 * accept() takes the connection for MPTCP's own if the sockhash has changed its sk_prot.
 */
static __always_inline void tb_announce(struct bpf_sock_ops *skops, const struct tb_pod *pod)
{
	struct tb_half_key key = {};
	struct tb_half half = {};
	__u64 request = tb_context_sock(skops);
	__u64 listener = tb_read64(request + OFF_REQUEST_SOCK_LISTENER);

	if (!listener || tb_ineligible(listener) || tb_pod_excludes(pod, skops->local_port))
		return;
	if ((pod->flags & TB_POD_PROXY_ONLY) && !tb_is_proxy(listener, pod))
		return;
	if (!tb_requested(skops, request, &key))
		return;
	key.netns = tb_netns(&key.client, request);
	half.server.pod_id = pod->id;
	half.server_netns = tb_read64(request + OFF_SOCK_NET);
	halves.insert(&key, &half);
}

/* ---- Joining through a Service --------------------------------------------------------- */

#define TB_ROTL(x, bits) ((x) << (bits) | (x) >> (64 - (bits)))

#define TB_SIPROUND(v0, v1, v2, v3)                                                                \
	do {                                                                                       \
		v0 += v1;                                                                          \
		v2 += v3;                                                                          \
		v1 = TB_ROTL(v1, 13) ^ v0;                                                         \
		v3 = TB_ROTL(v3, 16) ^ v2;                                                         \
		v0 = TB_ROTL(v0, 32);                                                              \
		v2 += v1;                                                                          \
		v0 += v3;                                                                          \
		v1 = TB_ROTL(v1, 17) ^ v2;                                                         \
		v3 = TB_ROTL(v3, 21) ^ v0;                                                         \
		v2 = TB_ROTL(v2, 32);                                                              \
	} while (0)

/*
 * RULE (identity). Where a Service's address was dialled, the node's address translation chooses
 * the server, and nothing that the client knows tells which pod that is. So the server's pod
 * vouches for itself: its SYN-ACK, which takes the way that the node's own rules gave it, has a
 * token in it, a MAC (SipHash-2-4) over the connection and the pod, under a secret that never
 * leaves the kernel. Whoever did not get this very SYN cannot make it, and one that was seen is
 * good for nothing else.
 */
static __always_inline __u64 tb_token(const struct tb_half_key *key, __u64 pod_id)
{
	int zero = 0;
	struct tb_secret *s = secret.lookup(&zero);
	__u64 word[5] = {
		(__u64)key->client.word[0] << 32 | key->client.word[1],
		(__u64)key->client.word[2] << 32 | key->client.word[3],
		(__u64)key->client_isn << 32 | key->server_isn,
		pod_id,
		32ULL << 56, /* the length, as SipHash has it */
	};
	__u64 v0, v1, v2, v3;
	int i;

	if (!s)
		return 0;
	v0 = s->key[0] ^ 0x736f6d6570736575ULL;
	v1 = s->key[1] ^ 0x646f72616e646f6dULL;
	v2 = s->key[0] ^ 0x6c7967656e657261ULL;
	v3 = s->key[1] ^ 0x7465646279746573ULL;
#pragma unroll
	for (i = 0; i < 5; i++) {
		v3 ^= word[i];
		TB_SIPROUND(v0, v1, v2, v3);
		TB_SIPROUND(v0, v1, v2, v3);
		v0 ^= word[i];
	}
	v2 ^= 0xff;
#pragma unroll
	for (i = 0; i < 4; i++)
		TB_SIPROUND(v0, v1, v2, v3);
	return v0 ^ v1 ^ v2 ^ v3;
}

/* A listener of a pod that serves Services asks to be called for its SYN-ACKs; its connections
 * inherit that, and end it when they are established. */
static __always_inline void tb_vouches(struct bpf_sock_ops *skops, int on)
{
	int flags = skops->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;

	if (on)
		flags |= BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
	if (flags != skops->bpf_sock_ops_cb_flags)
		bpf_sock_ops_cb_flags_set(skops, flags);
}

/* The client says that its SYN comes from this node: no other peer gets to see the option. */
static __always_inline void tb_dials(struct bpf_sock_ops *skops)
{
	__u64 sk = tb_context_sock(skops);
	struct tb_dial dial = {};
	__u32 one = 1;

	if (!TB_ADDR(skops, local, &dial.client))
		return;
	dial.client_isn = tb_read32(sk + OFF_TCP_SOCK_WRITE_SEQ) + 1;
	dials.update(&dial, &one);
}

/* The key of the connection whose SYN-ACK is being made, if it was announced by this pod, and if
 * the SYN came from this node. */
static __always_inline int tb_is_vouched_for(struct bpf_sock_ops *skops, const struct tb_pod *pod,
					     struct tb_half_key *key)
{
	__u64 request = tb_context_sock(skops);
	struct tb_dial dial = {};
	struct tb_half *half;

	if (skops->is_fullsock || !tb_requested(skops, request, key))
		return 0;
	dial.client = key->client;
	dial.client_isn = key->client_isn;
	if (!dials.lookup(&dial))
		return 0;
	half = halves.lookup(key);
	return half && half->server.pod_id == pod->id;
}

static __always_inline void tb_write_option(struct bpf_sock_ops *skops, const struct tb_pod *pod)
{
	struct tb_option option = {TB_OPTION_KIND, sizeof(option), TB_OPTION_ID};
	struct tb_half_key key = {};
	__u64 token;

	if (!tb_is_vouched_for(skops, pod, &key))
		return;
	if (skops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB) {
		bpf_reserve_hdr_opt(skops, sizeof(option), 0);
		return;
	}
	token = tb_token(&key, pod->id);
	__builtin_memcpy(option.token, &token, sizeof(token));
	bpf_store_hdr_opt(skops, &option, sizeof(option), 0);
}

static __always_inline void tb_reaches_services(struct bpf_sock_ops *skops,
						const struct tb_pod *pod)
{
	if (skops->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		tb_dials(skops);
	else if (skops->op == BPF_SOCK_OPS_TCP_LISTEN_CB)
		tb_vouches(skops, 1);
	else if (skops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		tb_vouches(skops, 0);
	else if (skops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB ||
		 skops->op == BPF_SOCK_OPS_WRITE_HDR_OPT_CB)
		tb_write_option(skops, pod);
}

/* Does the SYN-ACK that the client has just got show that the announcing pod has sent it? */
static __always_inline int tb_has_token(struct bpf_sock_ops *skops, const struct tb_half_key *key,
					const struct tb_half *half)
{
	/* To search by kind and ID, the length is that of the two (bpf_helpers(7)). */
	struct tb_option option = {TB_OPTION_KIND, 4, TB_OPTION_ID};
	__u64 token;

	if (bpf_load_hdr_opt(skops, &option, sizeof(option), 0) != sizeof(option))
		return 0;
	__builtin_memcpy(&token, option.token, sizeof(token));
	return token == tb_token(key, half->server.pod_id);
}

/* ---- Joining: the two ends find each other --------------------------------------------- */

/* The client's end is established, before the server's. It joins if it was announced. */
static __always_inline __u32 tb_client_established(struct bpf_sock_ops *skops,
						   const struct tb_pod *pod)
{
	__u64 sk = tb_context_sock(skops);
	struct tb_half_key key = {};
	struct tb_half half = {}, *found;
	struct tb_dial dial = {};
	struct tb_conn *conn;
	__u32 outcome;

	if (!TB_ADDR(skops, local, &key.client) || !TB_ADDR(skops, remote, &half.dialled))
		return TB_OUTCOME_NO_PEER;
	key.netns = tb_netns(&key.client, sk);
	key.client_isn = skops->snd_nxt;
	key.server_isn = skops->rcv_nxt;
	if (pod->flags & TB_POD_SERVICES) {
		dial.client = key.client;
		dial.client_isn = key.client_isn;
		dials.delete(&dial);
	}
	found = halves.lookup(&key);
	if (!found)
		return TB_OUTCOME_NO_PEER;
	/* A sidecar may speak in the name of a client elsewhere (TPROXY), to its own namespace. */
	if (found->client.id || (!key.netns && !tb_pod_owns(pod, &key.client) &&
				 found->server_netns != tb_read64(sk + OFF_SOCK_NET)))
		return TB_OUTCOME_MISMATCH;
	half.server.pod_id = found->server.pod_id;
	half.server_netns = found->server_netns;
	half.vouched = (pod->flags & TB_POD_SERVICES) && tb_has_token(skops, &key, found);
	half.dialled_port = bpf_ntohl(skops->remote_port);
	if (tb_pod_excludes(pod, half.dialled_port) || tb_pod_excludes(pod, skops->local_port))
		return TB_OUTCOME_EXCLUDED;
	conn = tb_join(skops, pod, sk, &outcome);
	if (!conn)
		return outcome;
	conn->half = key;
	half.client = conn->me;
	conn->seeking = !halves.update(&key, &half);
	if (half.server.pod_id == pod->id)
		tb_pace_not(skops, conn);
	tb_keep_alive(skops, pod, conn->me.sk);
	tb_call_on(skops, conn);
	return TB_OUTCOMES; /* none yet: counted when the server has joined as well */
}

/* Whether a connection may be this pod's server's. RULE (identity): a half is taken once, and
 * from another pod only by the pod whose IP was dialled, or that has vouched for itself, whatever
 * else anybody may know. */
static __always_inline int tb_half_fits(const struct tb_half *half, const struct tb_half_key *key,
					const struct tb_pod *pod, const struct tb_addr *local,
					__u64 netns)
{
	if (half->server.id || half->server_netns != netns)
		return 0;
	if (half->client.pod_id == pod->id)
		return 1;
	return !key->netns && tb_pod_owns(pod, local) &&
	       (tb_pod_owns(pod, &half->dialled) ||
		(half->vouched && half->server.pod_id == pod->id));
}

/* The server's end is established: it joins if its client did. */
static __always_inline __u32 tb_server_established(struct bpf_sock_ops *skops,
						   const struct tb_pod *pod, __u32 *hop)
{
	__u64 sk = tb_context_sock(skops);
	struct tb_half_key key = {};
	struct tb_addr local = {};
	struct tb_half half, *found;
	struct tb_conn *conn;
	__u32 outcome;

	if (!TB_ADDR(skops, remote, &key.client) || !TB_ADDR(skops, local, &local))
		return TB_OUTCOME_NO_PEER;
	key.netns = tb_netns(&key.client, sk);
	key.client_isn = skops->rcv_nxt;
	key.server_isn = skops->snd_nxt;
	found = halves.lookup(&key);
	if (!found)
		return TB_OUTCOME_NO_PEER;
	half = *found;
	if (!half.client.id) {
		halves.delete(&key); /* its client is not one of ours */
		return TB_OUTCOME_NO_PEER;
	}
	if (!tb_half_fits(&half, &key, pod, &local, tb_read64(sk + OFF_SOCK_NET)))
		return TB_OUTCOME_MISMATCH;
	if (tb_pod_excludes(pod, skops->local_port) || tb_pod_excludes(pod, half.dialled_port) ||
	    tb_pod_excludes(pod, bpf_ntohl(skops->remote_port)))
		return TB_OUTCOME_EXCLUDED;
	conn = tb_join(skops, pod, sk, &outcome);
	if (!conn)
		return outcome;
	conn->peer = half.client;
	*hop = conn->hop = tb_hop(&half.client, &conn->me);
	if (half.client.pod_id == pod->id)
		tb_pace_not(skops, conn);
	tb_keep_alive(skops, pod, conn->me.sk);
	tb_call_on(skops, conn);
	half.server = conn->me;
	halves.update(&key, &half);
	return TB_OUTCOME_PAIRED;
}

/* A client that closes before it has found its server takes its offer back. */
static __always_inline void tb_state_changed(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	if (skops->args[1] != BPF_TCP_CLOSE)
		return;
	tb_flush_tally(conn);
	if (conn->seeking)
		halves.delete(&conn->half);
	conn->seeking = 0;
}

/*
 * A client whose data is acknowledged, and whose server has not joined, is alone: the server's
 * callback ran before it acknowledged anything. It leaves the sockhash.
 *
 * RULE (removal). What lies unread in a removed socket's bypass queue is lost, and a redirect
 * to it on its way fails. Nobody can have redirected to this one: the server would have had to
 * take the offer first, and the offer is still there, untaken.
 */
static __always_inline void tb_leave_alone(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	struct tb_half *half;

	if (skops->snd_una == conn->half.client_isn)
		return; /* that was the SYN */
	half = halves.lookup(&conn->half);
	if (!half || half->server.id)
		return;
	conn->seeking = 0;
	halves.delete(&conn->half);
	sockhash.delete(&conn->me.id);
	tb_pace_again(skops, conn);
	tb_call_no_more(skops, conn);
	tb_count_outcome(conn->me.pod_id, TB_HOP_NONE, TB_OUTCOME_NO_PEER);
}

/* Does this end know its peer? The server does from the start; the client asks here. */
static __always_inline int tb_paired(struct tb_conn *conn)
{
	struct tb_half *half;

	if (conn->peer.id)
		return 1;
	if (!conn->seeking)
		return 0;
	half = halves.lookup(&conn->half);
	if (half && half->client.id != conn->me.id)
		half = NULL; /* dropped, and announced again for somebody else */
	if (!half || !half->server.id) {
		conn->seeking = !!half; /* the LRU map may have dropped it: stay on TCP */
		return 0;
	}
	conn->seeking = 0;
	conn->peer = half->server;
	conn->hop = tb_hop(&conn->me, &conn->peer);
	halves.delete(&conn->half);
	tb_count_outcome(conn->me.pod_id, conn->hop, TB_OUTCOME_PAIRED);
	return 1;
}

/* ---- Leaving the sockhash -------------------------------------------------------------- */

/* The peer looks at the word when it sees the count changed, see tb_peers_parting(). */
static __always_inline void tb_step(struct tb_conn *conn, __u32 parting)
{
	__u64 *count = tb_steps();

	conn->parting = parting;
	if (count)
		__sync_fetch_and_add(count, 1);
	conn->stepped_at = bpf_jiffies64(); /* last: from here it takes TB_PARTING_STEP at least */
}

/*
 * How far the peer is on its way out of the sockhash. It is asked only when somebody has taken a
 * step: once, and always from its first one on. A CPU with weak ordering may show the count before
 * the word; but at the second step it shows at least the first.
 */
static __always_inline __u32 tb_peers_parting(struct tb_conn *conn)
{
	__u64 *count = tb_steps();
	__u32 parting;

	if (!count || (*count == conn->steps && !conn->wary) || !tb_paired(conn))
		return TB_STAYING;
	conn->steps = *count;
	parting = tb_read32(conn->peer.conn + offsetof(struct tb_conn, parting));
	if (parting)
		conn->wary = 1;
	return parting;
}

static __always_inline void tb_depart(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	tb_flush_tally(conn);
	conn->parting = TB_PARTED;
	sockhash.delete(&conn->me.id);
	tb_call_no_more(skops, conn);
}

/*
 * A socket whose stream TCP does better leaves the sockhash, where it would be slower than TCP
 * even if it redirected nothing.
 *
 * RULE (removal), as above: nothing may be unread in this socket's queue, and no redirect to it on
 * its way, now or later. It goes in steps, each a while after the one before, long enough for every
 * CPU to see what was written:
 *   1. TB_PARTING. This end redirects nothing any more; whoever sends at the other end sees that,
 *      and parts as well if it can do so in good order.
 *   2. TB_CLOSED. Whoever sends at the other end from now on goes by TCP, come what may.
 *   3. TB_PARTED, out of the sockhash.
 * Nothing may be unread in this end's queue for 2 either: RULE (edges), see tb_leave().
 * After 1 and after 2 there must be a moment in which no redirect by the other end can be on its
 * way: it has parted itself, or no thread is inside a call on it (each would hold its psock; the
 * one reference is the sockhash's). So those that had looked before a step are done before the
 * next.
 */
static __always_inline void tb_take_leave(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	if (bpf_jiffies64() - conn->stepped_at < TB_PARTING_STEP)
		return;
	if (tb_read32(conn->peer.conn + offsetof(struct tb_conn, parting)) == TB_STAYING &&
	    tb_read32(conn->peer.psock + OFF_PSOCK_REFCNT) != 1)
		return;
	if (!tb_has_read_all(&conn->me))
		return;
	if (conn->parting == TB_PARTING)
		tb_step(conn, TB_CLOSED);
	else
		tb_depart(skops, conn);
}

/*
 * This socket sends a packet by TCP. One that only reads sends acknowledgements, and gets none by
 * which it could leave: when its peer has left, it follows, or its reads would cost more for good.
 *
 * RULE (removal), as above. The peer redirects nothing since its first step, when none of its
 * redirects was on its way. So nothing can come into this queue once it is empty. And what this end
 * ever redirected has arrived, or the peer would not have left. (If the peer's memory is another's
 * by now, the peer is closed, and all that holds as well.)
 */
static __always_inline void tb_follow(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	if (conn->parting != TB_PARTED && tb_peers_parting(conn) == TB_PARTED &&
	    tb_has_read_all(&conn->me))
		tb_depart(skops, conn);
}

/* ---- TCP's window inside a pod --------------------------------------------------------- */

/*
 * Did an acknowledgement come late, for which the window made this end wait? srtt is of the last
 * call and of what came since; what came with this call is in the next one's.
 */
static __always_inline int tb_has_waited(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	__u32 before = conn->srtt, was_limited = conn->is_limited;

	conn->srtt = skops->srtt_us >> 3;
	conn->is_limited = tb_read8(conn->me.sk + OFF_TCP_SOCK_IS_CWND_LIMITED) &
			   MASK_TCP_SOCK_IS_CWND_LIMITED;
	if (conn->srtt > TB_LATE && conn->srtt >= before)
		return was_limited || conn->is_limited;
	return conn->is_limited && tb_read32(conn->me.sk + OFF_TCP_SOCK_TLP_HIGH_SEQ);
}

/*
 * A reader that waits for more than the window holds (MSG_PEEK, FIONREAD) gets it only when the
 * sender probes for a loss, or when the acknowledgement's delay is over. Such a wait shows, as a
 * probe or in the round trip's time. But a stream's sender waits as well, while its reader has no
 * CPU. So the window grows, as slow start's would, to where it still gathers. There the two differ
 * by what goes by between one wait and the next: who waits for many small writes does not stream.
 */
static __always_inline void tb_count_waits(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	__u32 streamed = (skops->snd_una - conn->waited_at) / TB_WAIT_BYTES;

	if (!tb_has_waited(skops, conn))
		return;
	conn->waited_at = skops->snd_una;
	if (conn->held < TB_MANY_PACKETS && conn->wider < TB_WIDENINGS) {
		conn->wider++;
		return;
	}
	conn->waits -= tb_min(conn->waits, streamed);
	conn->waits += streamed ? 1 : TB_WAITS / 16;
}

/*
 * Does this end stream small writes by TCP? They are counted, against large ones, until it begins
 * to leave the sockhash, and one that has left for a crowd of them streams on. What it streams then
 * nobody sees. But acknowledgements are for few bytes each: writes of 1 KB, in a held window, for
 * 10 to 16 KB, of 4 KB for 46 KB and more.
 */
static __always_inline int tb_is_fine(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	if (conn->waiting > TB_FINE_WAITS + conn->stuck)
		return 1;
	if (!conn->parting)
		return 0;
	if (conn->crowd > TB_CROWD + conn->stuck)
		return 1;
	if (!conn->acks)
		conn->acked_at = skops->snd_una;
	if (conn->acks++ < TB_FINE_ACKS)
		return 0;
	conn->acks = 0;
	return skops->snd_una - conn->acked_at < TB_FINE_ACKS * TB_FINE;
}

/* May this connection's packets go another way than TCP's own? */
static __always_inline int tb_may_shape(struct tb_conn *conn)
{
	return conn->peer.pod_id == conn->me.pod_id && conn->waits < TB_WAITS &&
	       (int)tb_read32(conn->peer.sk + OFF_SOCK_RCVLOWAT) <= 1 && !tb_paused(conn);
}

/*
 * Inside a pod no packet waits or is lost on its way, and all that slow start does is grow the
 * congestion window until no stream fills it. TCP then sends each small write by itself, several
 * times as dearly as those that it gathers while it waits for an acknowledgement, and larger ones
 * out of the caches' reach. So the window of a socket that sends by TCP after all is held where it
 * is at its best; never below what TCP falls back to after each pause. Where TCP paces, it gathers
 * by itself, and the window is its pacing's. Who wants many bytes at once (SO_RCVLOWAT) would wait
 * for what the window holds back.
 */
static __always_inline __u32 tb_best_window(struct bpf_sock_ops *skops, struct tb_conn *conn,
					    int may_shape)
{
	__u32 mss = skops->mss_cache, packets = mss ? TB_IN_FLIGHT / mss : 0;

	if (packets < TB_FEW_PACKETS)
		packets = TB_FEW_PACKETS;
	if (!may_shape || tb_read32(conn->me.sk + OFF_SOCK_PACING_STATUS))
		return 0;
	if (packets > TB_FEW_PACKETS && conn->size >= TB_BULK && !conn->paced_by[0])
		return 0;
	return packets << conn->wider;
}

/*
 * Holds the window at so many packets; 0: not any more, and never again. One that has grown already
 * would not shrink, and one that somebody else has limited is left alone.
 */
static __always_inline void tb_hold_window(struct bpf_sock_ops *skops, struct tb_conn *conn,
					   __u32 packets)
{
	__u32 ours = conn->held ? conn->held : TB_OWN_WINDOW;
	int limit = packets ? packets : TB_ANY_WINDOW;

	if (packets == conn->held)
		return;
	if (tb_read32(conn->me.sk + OFF_TCP_SOCK_SND_CWND_CLAMP) != ours) {
		conn->held = 0;
		return;
	}
	if (packets && skops->snd_cwnd > packets)
		return;
	if (!bpf_setsockopt(skops, SOL_TCP, TCP_BPF_SNDCWND_CLAMP, &limit, sizeof(limit)))
		conn->held = packets;
}

/* Only bytes that went by TCP are acknowledged: while a connection bypasses, this never runs. */
static __always_inline void tb_data_acknowledged(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	int may_shape;

	if (!conn->me.id)
		return;
	if (!tb_paired(conn)) {
		if (conn->seeking)
			tb_leave_alone(skops, conn);
		else
			tb_pace_again(skops, conn);
		return;
	}
	if (conn->held)
		tb_count_waits(skops, conn);
	may_shape = tb_may_shape(conn);
	if (!may_shape || tb_is_fine(skops, conn))
		tb_pace_again(skops, conn);
	tb_hold_window(skops, conn, tb_best_window(skops, conn, may_shape));
	if (conn->parting == TB_PARTING || conn->parting == TB_CLOSED)
		tb_take_leave(skops, conn);
	else if (conn->parting == TB_PARTED && !tb_is_shaped(conn))
		tb_call_no_more(skops, conn);
}

/* ---- The program tb_sock_ops ----------------------------------------------------------- */

/*
 * RULE (identity). The socket disconnected (AF_UNSPEC) and is used again. What lies unread in its
 * bypass queue belongs to the old connection, and the old peer may not have heard of the end: out
 * of the sockhash, which throws the queue away and makes the old id unreachable. Nobody can be
 * asleep in a read: the socket was closed.
 */
static __always_inline void tb_used_again(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	if (conn->me.id)
		sockhash.delete(&conn->me.id);
	conn->me.id = 0;
	tb_pace_again(skops, conn);
	tb_hold_window(skops, conn, 0);
	tb_call_no_more(skops, conn);
}

/* Later callbacks of a socket that has joined. */
static __always_inline void tb_socket_lives_on(struct bpf_sock_ops *skops)
{
	struct bpf_sock *sk = skops->sk;
	struct tb_conn *conn;

	if (!sk)
		return;
	conn = conns.sk_storage_get(sk, 0, 0);
	if (!conn)
		return;
	if (skops->op == BPF_SOCK_OPS_RTT_CB)
		tb_data_acknowledged(skops, conn);
	else if (skops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB)
		tb_follow(skops, conn);
	else if (skops->op == BPF_SOCK_OPS_STATE_CB)
		tb_state_changed(skops, conn);
	else
		tb_used_again(skops, conn);
}

/* Attached to the pod's cgroup. Must return 1, and must not touch skops->reply: other
 * programs on the same cgroup answer RWND_INIT and the like with it. */
int tb_sock_ops(struct bpf_sock_ops *skops)
{
	int of_joined = skops->op == BPF_SOCK_OPS_STATE_CB || skops->op == BPF_SOCK_OPS_RTT_CB ||
			(skops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB && skops->is_fullsock);
	__u32 outcome, hop = TB_HOP_NONE;
	struct tb_pod *pod;

	if (of_joined || skops->op == BPF_SOCK_OPS_TCP_CONNECT_CB ||
	    skops->op == BPF_SOCK_OPS_TCP_LISTEN_CB)
		tb_socket_lives_on(skops);
	/* Those that come for each packet end here: in early 5.10 a softirq can put another pod's
	 * record, or none, in the place of the one that the next line gets. */
	if (of_joined)
		return 1;
	pod = (struct tb_pod *)(long)pods.get_local_storage(0);
	if (!pod || !pod->id)
		return 1;
	if (pod->flags & TB_POD_SERVICES)
		tb_reaches_services(skops, pod);
	if (skops->op == BPF_SOCK_OPS_RWND_INIT && !skops->is_fullsock)
		tb_announce(skops, pod);
	if (skops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		outcome = tb_client_established(skops, pod);
	else if (skops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		outcome = tb_server_established(skops, pod, &hop);
	else
		return 1;
	tb_count_outcome(pod->id, hop, outcome);
	return 1;
}

/* ---- Sending: from TCP to bypass ------------------------------------------------------- */

/*
 * A redirect takes the peer's socket lock, and waits for it in a sleep that no signal ends. An
 * application that is throttled or faults inside recv holds it for long, and over TCP nobody
 * would notice. A sidecar does neither; and large transfers to it from another CPU would
 * otherwise be thrown back to TCP.
 */
static __always_inline int tb_busy(const struct tb_conn *conn)
{
	return !conn->peer.is_proxy && tb_read32(conn->peer.sk + OFF_SOCK_LOCK_OWNED);
}

static __always_inline int tb_is_nonblocking(__u64 sk)
{
	__u64 file = tb_read64(tb_read64(sk + OFF_SOCK_SOCKET) + OFF_SOCKET_FILE);

	return (tb_read32(file + OFF_FILE_FLAGS) & O_NONBLOCK) != 0;
}

/* Does whoever reads take what is there, and not wait for more? */
static __always_inline int tb_takes_what_comes(__u64 sk)
{
	return tb_is_nonblocking(sk) && (int)tb_read32(sk + OFF_SOCK_RCVLOWAT) <= 1;
}

/*
 * Has the peer consumed everything up to `seq`, and cannot it sleep on a part of what it waits for?
 * Then it need not declare anything. Reads from a non-blocking file never sleep, whatever their
 * flags; a thread that does sleep here was there before the file was made so, or polls.
 */
static __always_inline int tb_has_consumed(const struct tb_conn *conn, __u32 seq)
{
	__u64 sk = conn->peer.sk;

	return tb_read32(sk + OFF_TCP_SOCK_COPIED_SEQ) == seq && tb_takes_what_comes(sk) &&
	       !tb_busy(conn) && !tb_has_sleeper(sk) && !tb_busy(conn);
}

/*
 * RULE (order). A receiver reads redirected bytes before anything in its TCP queue. So from
 * TCP to bypass only when the peer has declared, after the last byte this end sent by TCP,
 * that it had consumed everything (tb_mark_consumed). From bypass to TCP any time.
 *
 * RULE (peekers). Nor to a peer whose application has not taken a byte: it may peek until enough is
 * there, as a sidecar's listener filters do, and bypassed bytes hide from it what comes by TCP once
 * they are too many. So the first message goes by TCP, and those behind it until it is consumed.
 *
 * Sequence numbers wrap after 4 GiB. A mark is therefore believed at most once, and never
 * again after it was seen not to match: write_seq only moves on, so such a mark is old. This runs
 * at least for every second message (after a send that ended in EAGAIN the kernel sends one by
 * TCP without asking), far more often than every 4 GiB.
 */
static __always_inline int tb_may_bypass(struct tb_conn *conn, __u32 write_seq)
{
	__u64 mark = conn->tx_mark;

	if (mark && (__u32)mark == write_seq)
		return 1;
	if (mark && mark >> 32 != TB_SEEN)
		conn->tx_dead = mark;
	conn->tx_mark = 0;
	if (write_seq == conn->first)
		return 0;
	mark = tb_read64(conn->peer.conn + offsetof(struct tb_conn, rx_mark));
	if (mark && mark != conn->tx_dead) {
		if ((__u32)mark == write_seq)
			conn->tx_mark = mark;
		else
			conn->tx_dead = mark;
	}
	if (!conn->tx_mark && tb_has_consumed(conn, write_seq))
		conn->tx_mark = TB_SEEN << 32 | write_seq;
	return conn->tx_mark != 0;
}

/*
 * RULE (order). The kernel lets go of the sender's lock between this verdict and the peer's queue
 * (tcp_bpf_send_verdict). So a redirect by another thread may still be on its way, and a message
 * that goes by TCP now would overtake it. Nobody else is on the way if all redirects were this
 * thread's, or if nobody else holds the psock: one reference is the sockhash's, one this call's.
 */
static __always_inline int tb_alone(struct tb_conn *conn, __u64 thread)
{
	return !conn->writer || conn->writer == thread ||
	       tb_read32(conn->me.psock + OFF_PSOCK_REFCNT) == 2;
}

/*
 * Has one end shut down its direction, or heard that the other has?
 *
 * RULE (conntrack). From the first FIN on conntrack keeps an entry for a minute or two only. So
 * what the other direction still says goes by TCP, whose packets keep the entry as long as they
 * come.
 */
static __always_inline int tb_is_half_closed(const struct tb_conn *conn, const void *tp)
{
	return TB_OWN(__u8, tp, OFF_SOCK_STATE) != TCP_ESTABLISHED ||
	       tb_read8(conn->peer.sk + OFF_SOCK_STATE) != TCP_ESTABLISHED;
}

/* ---- Sending: what a peer may leave unread --------------------------------------------- */

/* Pages of files, of a memory cgroup and those below, that reclaim takes first. The kernel's
 * statistics are two seconds old, and may be negative meanwhile; and some pages must be written
 * first: half of them are believed. */
static __always_inline __u64 tb_cached(__u64 memcg)
{
	__u64 stats = memcg + OFF_MEMCG_VMSTATS;
	__s64 pages;

	if (!OFF_MEMCG_VMSTATS)
		return 0;
	if (TB_VMSTATS_APART)
		stats = tb_read64(stats) + OFF_MEMCG_VMSTATS_STATE;
	pages = tb_read64(stats + sizeof(__u64) * TB_INACTIVE_FILE);
	return pages > 0 ? (__u64)pages / 2 : 0;
}

/* Bytes that a memory cgroup may still be charged, as the kubelet counts them, beyond its reserve;
 * from its struct page_counter, which is a member of it. */
static __always_inline __u64 tb_free(__u64 counter)
{
	__u64 limit = tb_read64(counter + OFF_PAGE_COUNTER_MAX);
	__u64 used = tb_read64(counter + OFF_PAGE_COUNTER_USAGE);
	__u64 reserve = limit / TB_RESERVE;

	limit -= reserve < TB_AMPLE ? reserve : TB_AMPLE;
	if (used + TB_AMPLE > limit)
		limit += tb_cached(counter - OFF_MEMCG_MEMORY);
	return used < limit ? (limit - used) * TB_PAGE_SIZE : 0;
}

/*
 * How many bytes an end may leave unread, as the memory limits of its container have it (cgroup2).
 *
 * RULE (memory). Bytes that lie unread are charged to their receiver's container. Of TCP's that is
 * about sk_rcvbuf, charged in interrupts, past the limit if need be. Redirected ones are charged by
 * a sender that may sleep: past the limit the kernel kills a process there. Hence each connection
 * takes but a share of what is free, so that many that rest at once leave some. Whose container a
 * socket is charged to nobody knows before it is accepted.
 */
static __always_inline __u64 tb_room(const struct tb_end *end)
{
	__u64 memcg = OFF_SOCK_MEMCG ? tb_read64(end->sk + OFF_SOCK_MEMCG) : 0;
	__u64 counter = memcg ? memcg + OFF_MEMCG_MEMORY : 0, least = ~0ULL;
	int level;

#pragma unroll
	for (level = 0; level < TB_LEVELS; level++) {
		__u64 bytes = counter ? tb_free(counter) : ~0ULL;

		least = bytes < least ? bytes : least;
		counter = counter ? tb_read64(counter + OFF_PAGE_COUNTER_PARENT) : 0;
	}
	return least / TB_SHARE;
}

/* The kernel's memory for TCP is over its mark (net.ipv4.tcp_mem): from here on a redirect may fail
 * with ENOMEM, which no TCP send does. */
static __always_inline int tb_under_pressure(const struct tb_conn *conn)
{
	return conn->pressure && tb_read64(conn->pressure);
}

/*
 * How much the peer may leave unread; 0: it had better be left alone.
 *
 * RULE (loss). Kernels charge redirected bytes to their receiver (Linux 6.13 and later stable
 * ones), and its TCP drops what does not fit beside them, be it a FIN; the sender finds out by a
 * probe, 0.2 s later, and later yet behind a reader that rests. While the peer is inside a read,
 * 2 * sk_rcvbuf + sk_sndbuf / 2 fit (tcp_add_to_backlog); else what sk_rcvbuf may grow to
 * (tcp_clamp_window): not at all once SO_RCVBUF is set. An sk_rcvbuf of the one and half of the
 * other are left to TCP, whose window is made from sk_rcvbuf; not so with tcp_shrink_window.
 *
 * An application may pass the bound by TB_MAX_OVERDUE: so much is spared for it, of what sk_rcvbuf
 * may grow to, and inside a pod, where sk_sndbuf is megabytes, a quarter of that.
 *
 * TB_STRICT: some kernels drop whatever passes sk_rcvbuf. There the window that TCP has offered is
 * left to it, and at least half; and an application may pass the bound by half of TB_SHORT_OVERDUE.
 */
static __always_inline __u32 tb_bound(const struct tb_end *peer)
{
	__u64 net = tb_read64(peer->sk + OFF_SOCK_NET);
	__u32 rcvbuf = tb_read32(peer->sk + OFF_SOCK_RCVBUF);
	__u32 sndbuf = tb_read32(peer->sk + OFF_SOCK_SNDBUF);
	__u32 most = tb_read32(net + OFF_NET_TCP_RMEM + 2 * sizeof(__u32)) / 2;
	__u32 spared = peer->is_proxy ? TB_SPARED : TB_MAX_OVERDUE;

	if (most < spared + TB_SPARED ||
	    (tb_read8(peer->sk + OFF_SOCK_USERLOCKS) & MASK_SOCK_RCVBUF_LOCK) ||
	    (OFF_NET_TCP_SHRINK_WINDOW && tb_read8(net + OFF_NET_TCP_SHRINK_WINDOW)))
		return 0;
	if (TB_STRICT) {
		__u32 window = tb_read32(peer->sk + OFF_TCP_SOCK_RCV_WND);

		return tb_min(rcvbuf / 4, (rcvbuf - tb_min(rcvbuf, window)) / 2);
	}
	return tb_min(tb_min(most - spared, TB_MAX_BOUND),
		      rcvbuf + sndbuf / (peer->is_proxy ? 2 : 4));
}

/*
 * Looks at the peer's queue: is it empty, and does the peer read? One that does not seem to is
 * looked at again at the next message: its head may just have the address that an earlier one had.
 */
static __always_inline int tb_look(struct tb_conn *conn)
{
	__u64 oldest = tb_oldest(&conn->peer);
	int empty = tb_is_empty(&conn->peer, oldest), moves = empty || oldest != conn->oldest;
	int was_empty = tb_is_empty(&conn->peer, conn->oldest);
	__u32 relief = TB_RELIEF * (was_empty ? 1 : 1 + conn->small);

	if (empty)
		conn->queued = 0;
	if (moves)
		conn->crowd -= tb_min(conn->crowd, relief);
	else
		conn->crowd = tb_min(conn->crowd + conn->small, 2 * TB_LARGE_CROWD);
	conn->bound = tb_bound(&conn->peer);
	conn->oldest = oldest;
	conn->small = 0;
	conn->look_at = conn->queued + (moves ? TB_LOOK : 0);
	return empty;
}

/* What a message takes of the node's memory: a 1-byte message a thousand times what it holds. */
static __always_inline __u32 tb_cost(__u32 size)
{
	return size + TB_MESSAGE_COST;
}

/*
 * Why this message should leave the bypass, or TB_REASONS.
 *
 * RULE (backpressure). Nothing in the kernel stops a redirecting sender. Past the peer's own
 * receive buffer the bytes go by TCP, whose window does. Kernels before 6.13 do not charge
 * redirected bytes to the receiver, so they are counted here, from the last time the peer's
 * queue was seen empty: never less than what is unread. Looking costs, so one looks now and then,
 * and at every message once this may be half of what is allowed.
 */
static __always_inline __u32 tb_reason_to_leave(struct tb_conn *conn, const void *tp, __u32 size)
{
	__u64 unread = conn->queued + tb_cost(size);
	int looks = unread > conn->look_at || unread > conn->bound / 2;

	if (looks && tb_look(conn))
		unread = tb_cost(size);
	conn->small += size < TB_SMALL;
	if (tb_paused(conn))
		return TB_REASON_PAUSED;
	if (looks && (tb_under_pressure(conn) || unread > tb_room(&conn->peer))) {
		conn->look_at = 0; /* until it has room again */
		return TB_REASON_MEMORY;
	}
	if (tb_busy(conn))
		return TB_REASON_BUSY;
	/* Only TCP can hold back what TCP_CORK holds back. */
	if (TB_OWN(__u8, tp, OFF_TCP_SOCK_NONAGLE) & MASK_TCP_NAGLE_CORK)
		return TB_REASON_CORKED;
	if (tb_is_half_closed(conn, tp))
		return TB_REASON_HALF_CLOSED;
	if (unread > conn->bound)
		return TB_REASON_BACKLOG;
	return TB_REASONS;
}

/* ---- Sending: from bypass to TCP, and out of the sockhash ------------------------------ */

/* First step out of the sockhash; no redirect of this end's may be on its way. */
static __always_inline void tb_part(struct tb_conn *conn)
{
	conn->writer = 0;
	tb_step(conn, TB_PARTING);
}

/*
 * Does TCP gather small writes for good, so that it is faster than one redirect for each? It does
 * without TCP_NODELAY, if it paces what it sends, as BBR has it, and in a window that is held.
 * Otherwise it sends each at once as soon as its window has grown, some tenths of a second into a
 * stream, and is two to four times as slow.
 */
static __always_inline int tb_gathers(const struct tb_conn *conn, const void *tp)
{
	if (conn->held && (conn->held == TB_FEW_PACKETS || conn->size >= TB_TINY))
		return 1;
	return !(TB_OWN(__u8, tp, OFF_TCP_SOCK_NONAGLE) & MASK_TCP_NAGLE_OFF) ||
	       TB_OWN(__u32, tp, OFF_SOCK_PACING_STATUS);
}

/* Would TCP do this stream better, or is the peer leaving the sockhash? */
static __always_inline int tb_should_part(const struct tb_conn *conn, const void *tp)
{
	__u32 crowd = conn->held ? TB_LARGE_CROWD : TB_CROWD;

	return conn->wary || (conn->crowd > crowd && tb_gathers(conn, tp));
}

/* What a message counts where nothing is gained: TB_STUCK is 2,048 small ones, or 32 MB. */
static __always_inline __u32 tb_weight(__u32 size)
{
	return 2 + size / TB_SMALL;
}

/* How many bytes may go on bypassing for want of a good moment to leave: none that a sidecar would
 * leave unread past its bound, or past its container's. As many as ever for RULE (order), which the
 * short ones are too few for. */
static __always_inline __u32 tb_patience(const struct tb_conn *conn, __u32 size, __u32 reason,
					 int alone)
{
	if (reason == TB_REASON_MEMORY && tb_under_pressure(conn))
		return 0;
	if (!alone)
		return TB_MAX_OVERDUE;
	if (conn->peer.is_proxy &&
	    (reason == TB_REASON_MEMORY || conn->queued + tb_cost(size) > conn->bound))
		return 0;
	if (TB_STRICT)
		return TB_SHORT_OVERDUE / 2;
	return reason == TB_REASON_MEMORY ? TB_SHORT_OVERDUE : TB_MAX_OVERDUE;
}

/* Will no message like this be bypassed for long, so that the socket is better off outside? */
static __always_inline int tb_leaves_for_good(const struct tb_conn *conn, __u32 reason)
{
	return (reason == TB_REASON_BACKLOG && !conn->bound) ||
	       (reason == TB_REASON_MEMORY && conn->scarce > TB_STUCK_LONG);
}

/*
 * Why this message leaves the bypass, or TB_REASONS.
 *
 * RULE (edges). While bypassed and TCP bytes both lie unread, a recv returns the bypassed ones
 * only: short, though there is more. epoll(7) lets an edge-triggered reader take a short read for
 * the end, and no other edge may come; and a reader that peeks until enough is there never sees
 * more. So the bypass is left when the peer's queue is empty. Between two pods also when an
 * application there is busy: it must not hold up another pod by its socket's lock, and mostly
 * reads, so that the edge is still to come.
 *
 * Until a message can leave in good order, messages go on bypassing; for a bounded time. A sidecar
 * reads until EAGAIN, and is left at the bound.
 */
static __always_inline __u32 tb_leave(struct tb_conn *conn, const void *tp, __u32 size,
				      __u64 thread)
{
	__u32 reason = tb_reason_to_leave(conn, tp, size);
	int alone, clean;

	if (reason == TB_REASONS)
		conn->overdue = 0;
	if (reason == TB_REASONS && !tb_should_part(conn, tp))
		return reason;
	alone = tb_alone(conn, thread);
	clean = alone && (tb_has_read_all(&conn->peer) ||
			  (reason == TB_REASON_BUSY && conn->me.pod_id != conn->peer.pod_id));
	if (reason == TB_REASONS) {
		if (clean)
			tb_part(conn);
		return clean ? TB_REASON_STREAM : TB_REASONS;
	}
	if (reason == TB_REASON_MEMORY && !tb_under_pressure(conn))
		conn->scarce += tb_weight(size);
	if (clean && tb_leaves_for_good(conn, reason))
		tb_part(conn);
	conn->overdue += tb_cost(size);
	if (!clean && conn->overdue < tb_patience(conn, size, reason, alone))
		return TB_REASONS;
	conn->writer = alone ? 0 : TB_MANY;
	conn->overdue = 0;
	return reason;
}

/* Must this message go by TCP, because one end is on its way out of the sockhash? */
static __always_inline int tb_is_parting(struct tb_conn *conn, __u64 thread)
{
	int closed = !conn->parting && tb_peers_parting(conn) >= TB_CLOSED;

	if (closed && tb_alone(conn, thread))
		tb_part(conn);
	return conn->parting || closed;
}

/*
 * Small writes may be bypassed again once TCP gathers them no more: if it ever does so, and if
 * their reader lets them return by itself. To ask costs, so one asks now and then.
 */
static __always_inline int tb_waits_in_vain(const struct tb_conn *conn, const void *tp)
{
	__u64 sk = conn->peer.sk;

	if (conn->waiting < TB_STUCK || conn->waiting % TB_STUCK >= tb_weight(0))
		return 0;
	return tb_gathers(conn, tp) || !tb_takes_what_comes(sk) || tb_has_sleeper(sk);
}

/*
 * The order rule keeps this message on TCP. Where it does so all the time, as towards an
 * application that never answers, the socket is better off outside the sockhash.
 */
static __always_inline __u32 tb_kept_on_tcp(struct tb_conn *conn, const void *tp, __u32 size,
					    __u64 thread)
{
	if (tb_paused(conn))
		return TB_REASON_PAUSED;
	if (size < TB_SMALL)
		conn->waiting += tb_weight(size);
	else
		conn->stuck += tb_weight(size);
	if (tb_waits_in_vain(conn, tp))
		conn->stuck = TB_STUCK + 1;
	if ((conn->stuck > TB_STUCK || conn->waiting > TB_STUCK_LONG || tb_should_part(conn, tp)) &&
	    tb_alone(conn, thread))
		tb_part(conn);
	return TB_REASON_ORDER;
}

static __always_inline void tb_gained(struct tb_conn *conn, __u32 weight)
{
	__u32 of_stuck = tb_min(conn->stuck, weight);

	conn->stuck -= of_stuck;
	conn->waiting -= tb_min(conn->waiting, weight - of_stuck);
	conn->scarce -= tb_min(conn->scarce, weight);
}

/* ---- The program tb_sk_msg ------------------------------------------------------------- */

/* Redirects the message and returns TB_REASONS, or returns why it must go by TCP. */
static __always_inline __u32 tb_redirect(struct sk_msg_md *msg, struct tb_conn *conn,
					 const void *tp)
{
	__u64 thread = bpf_get_current_task();
	__u32 reason;

	tb_mark_consumed(conn, TB_OWN(__u32, tp, OFF_TCP_SOCK_COPIED_SEQ));
	if (!tb_paired(conn))
		return TB_REASON_UNPAIRED;
	if (tb_is_parting(conn, thread))
		return TB_REASON_STREAM;
	if (!tb_may_bypass(conn, TB_OWN(__u32, tp, OFF_TCP_SOCK_WRITE_SEQ)))
		return tb_kept_on_tcp(conn, tp, msg->size, thread);
	/* With kTLS at either end the bytes here are not the bytes on the wire. A peer that has got
	 * it has another sk_prot since (tls_init), as has one that has left the sockhash, and one
	 * whose bytes another program's sockmap takes. */
	if (tb_read64(conn->peer.sk + OFF_SOCK_PROT) != conn->peer.prot)
		return tb_read64(conn->peer.sk + OFF_ICSK_ULP_OPS) ? TB_REASON_INELIGIBLE
								   : TB_REASON_GONE;
	/* And for a bypassed MSG_ZEROCOPY no completion comes. */
	if ((TB_OWN(__u64, tp, OFF_SOCK_FLAGS) & (1ULL << BIT_SOCK_ZEROCOPY)) ||
	    TB_OWN(__u64, tp, OFF_ICSK_ULP_OPS))
		return TB_REASON_INELIGIBLE;
	reason = tb_leave(conn, tp, msg->size, thread);
	if (reason != TB_REASONS)
		return reason;
	conn->queued += tb_cost(msg->size);
	/* RULE (identity). The peer's memory may have been freed and reused while it was read
	 * above. The id proves it was not: only the very same connection is found by it. */
	if (sockhash.msg_redirect_hash(msg, &conn->peer.id, BPF_F_INGRESS) != SK_PASS)
		return TB_REASON_GONE;
	conn->writer = tb_alone(conn, thread) ? thread : TB_MANY;
	tb_gained(conn, tb_weight(msg->size));
	return TB_REASONS;
}

static __always_inline void tb_count_bypassed(struct tb_conn *conn, __u32 size)
{
	__u64 now = bpf_jiffies64();

	conn->messages++;
	conn->bytes += size;
	if (conn->tallied_at == now)
		return;
	conn->tallied_at = now;
	tb_flush_tally(conn);
}

static __always_inline void tb_count_tcp(struct tb_conn *conn, __u32 reason, __u32 size)
{
	struct tb_counters *c = tb_counters_of(conn->me.pod_id, conn->hop);

	if (!c || reason >= TB_REASONS)
		return;
	c->tcp_messages[reason]++;
	c->tcp_bytes += size;
}

/* Attached to the sockhash. Always SK_PASS: anything else fails the application's send. */
int tb_sk_msg(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct tb_conn *conn;
	const void *tp;
	__u32 reason;

	if (!sk)
		return SK_PASS;
	conn = conns.sk_storage_get(sk, 0, 0);
	if (!conn)
		return SK_PASS;
	tp = TB_TCP_SOCK(sk, conn->me.sk);
	if (!tp)
		return SK_PASS;
	conn->size = msg->size;
	reason = tb_redirect(msg, conn, tp);
	if (reason < TB_REASONS)
		tb_count_tcp(conn, reason, msg->size);
	else
		tb_count_bypassed(conn, msg->size);
	return SK_PASS;
}
