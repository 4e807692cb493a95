/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the programs remember: of connections whose ends look for each other, of sockets, of the
 * node.
 *
 * RULE (state). A socket's struct tb_conn is written for that socket alone: in its callbacks and
 * its sends, under its lock, and in visits, without. The peer reads `me.id`, `peer.id`, `refused`,
 * `state`, `exchanges`, `wanted`, `watched`, `path`, `sent`, `decided`, `begun` and the members of
 * `at` of it, each one aligned word.
 */

/* An id is the socket's cookie and, in its low bits, a count of its connections. */
#define TB_ID_SHIFT 16
#define TB_MAX_PODS 4096
#define TB_MAX_SPLICERS 65536

/* One end of a connection. Kernel addresses are numbers here: RULE (reads). */
struct tb_end {
	__u64 id;   /* its key in the sockhash; 0: none */
	__u64 sk;   /* struct sock * */
	__u64 conn; /* struct tb_conn * */
	__u64 pod_id;
	__u32 is_proxy;
	__u32 is_client;
};

/* In place of a struct sk_psock *, while the kernel puts the socket into the sockhash. */
#define TB_JOINING 1ULL

/* Where a socket in the sockhash has what its peer looks at. Written when it joins. */
struct tb_place {
	__u64 psock; /* struct sk_psock *; 0: it never joined */
	__u64 prot;  /* struct proto *, the one it has in the sockhash */
	__u64 file;  /* struct file * */
};

/*
 * The key of a connection: RULE (identity) in pairing.h. `netns` is 0 for a client address that ADD
 * recorded for the client's pod, which is unique on the node.
 */
struct tb_half_key {
	struct tb_addr client;
	__u64 netns;	  /* struct net *, the client's */
	__u32 client_isn; /* sequence number of the client's first data byte */
	__u32 server_isn;
};

/* A client enters its connection into map `halves`, and the server looks for it there. */
struct tb_half {
	struct tb_end client;
	struct tb_end server;	/* id 0: not found yet */
	__u64 client_netns;	/* struct net * */
	__u64 token;		/* of the SYN-ACK: services.h; 0: it had none */
	struct tb_addr dialled; /* where the client meant to go */
	__u32 dialled_port;	/* host byte order */
	__u32 reserved;
};

/* Has a thread asked to splice from a socket, and was it allowed to? */
enum tb_splice { TB_SPLICE_ASKED, TB_SPLICE_ALLOWED };

/* A connect of a pod without a sidecar: its SYN is about to go out. */
struct tb_dial {
	struct tb_addr client;
	__u32 client_isn;
};

/* Which way a direction's bytes go. */
enum tb_path {
	TB_PATH_TCP,
	TB_PATH_BYPASS,
	TB_PATH_BEHIND, /* by TCP, and they may lie behind bypassed ones: edge.h */
};

/* Is a paired socket in the sockhash? In the low bits of tb_conn.state; above them a count of its
 * changes, so that a peer that has seen one state knows it again. */
enum tb_membership {
	TB_OUT,
	TB_MEMBER,
	TB_LEAVING, /* the peer must bypass no byte into its empty queue */
	TB_MEMBERSHIPS = 4,
};

/* A socket that has been looked at, in its sk_storage. Times are nanoseconds. */
struct tb_conn {
	/* The connection: pairing.h */
	struct tb_end me;
	struct tb_end peer;	 /* id 0: not paired yet */
	struct tb_half_key half; /* a client finds its server by it */
	__u64 last_id;		 /* the newest id of this socket, kept over a disconnect */
	__u64 token;		 /* of the SYN-ACK that a client got through a Service */
	/* Whether it joins, and leaves: readers.h, known.h, joining.h */
	__u32 refused;	 /* enum tb_outcome that keeps it out for good; 0: none */
	__u32 state;	 /* enum tb_membership and the count of its changes */
	__u32 exchanges; /* since it was met, or has left: bytes went there and back */
	__u32 wanted;	 /* so many of those before each packet is looked at */
	__u32 watched;	 /* and so many since then */
	struct {
		__u32 received; /* rcv_nxt at its last exchange */
		__u32 sent;	/* and write_seq */
	} moved;
	__u64 since; /* when it was first looked at, or `state` changed */
	struct tb_place at;
	__u64 noted; /* tb_begun() at the second visit of leaving; 0: none */
	/* Its sends: order.h, unread.h */
	__u32 path;	  /* enum tb_path */
	__u32 sent;	  /* messages sent from the sockhash; wraps */
	__u32 decided;	  /* of those, so many have their verdict */
	__u32 begun;	  /* of those since it joined, begun while on the bypass */
	__u32 tcp_seq;	  /* write_seq when it went to the bypass */
	__u32 peer_state; /* of the peer's, when this direction went to the bypass */
	__u32 peer_sent;  /* of the peer's, at the last message */
	__u32 run;	  /* sent since the peer last sent, in bytes of tb_cost() */
	__u32 queued;	  /* what the peer may have unread, in bytes of tb_cost() */
	__u32 credit;	  /* so much may go by TCP before it leaves, in bytes of tb_cost() */
	__u64 tcp_at;	  /* when a message last went by TCP */
	struct tb_place there;
	struct { /* bypassed, and not in the counters yet */
		__u64 messages;
		__u64 bytes;
		__u64 at;
	} tally;
};

/* What only the kernel's own programs know. */
struct tb_secret {
	__u64 key[2];
};

BPF_CGROUP_STORAGE(pods, struct tb_pod); /* written by ADD */
BPF_SK_STORAGE(conns, struct tb_conn);
BPF_SOCKHASH(sockhash, __u64, TB_MAX_SOCKETS); /* by tb_conn.me.id */
/* Until both ends have found each other. */
BPF_F_TABLE("lru_hash", struct tb_half_key, struct tb_half, halves, TB_MAX_PENDING, 0);
/* 1, from SYN to SYN-ACK of a connect to a Service. */
BPF_F_TABLE("lru_hash", struct tb_dial, __u32, dials, TB_MAX_PENDING, 0);
BPF_ARRAY(secret, struct tb_secret, 1); /* drawn anew by each load */
BPF_F_TABLE("percpu_hash", struct tb_counter_key, struct tb_counters, counters, TB_MAX_COUNTERS,
	    BPF_F_NO_PREALLOC);
BPF_ARRAY(no_counters, struct tb_counters, 1); /* zeros: too many for the stack */
BPF_ARRAY(control, struct tb_control, 1);      /* written by the node program */
BPF_ARRAY(beat, __u64, 1); /* nanoseconds: when the joiner last looked; 0: none has */
/* By pod id: tcpip_bypass.h. */
BPF_F_TABLE("hash", __u64, __u32, paused_pods, TB_MAX_PODS, BPF_F_NO_PREALLOC);
BPF_F_TABLE("hash", __u64, struct tb_due, due, TB_MAX_PODS, BPF_F_NO_PREALLOC);
BPF_RINGBUF_OUTPUT(bell, 4); /* a pass is due; 1: for an edge */
BPF_ARRAY(fionread, struct tb_fionread, 1);
BPF_ARRAY(sockhash_id, __u32, 1); /* the kernel's ID of map sockhash */
/* By cookies of sockets: enum tb_splice, once splice(2) was called on it. By those of network
 * namespaces: 1, once it was called there. */
BPF_F_TABLE("lru_hash", __u64, __u32, splicers, TB_MAX_SPLICERS, 0);
BPF_F_TABLE("lru_hash", __u64, __u32, splicing, TB_MAX_PODS, 0);

_Static_assert(offsetof(struct tb_conn, me.id) == 0, "user space writes TB_CANARY there");

static __always_inline __u32 tb_membership(__u32 state)
{
	return state % TB_MEMBERSHIPS;
}

static __always_inline void tb_set_membership(struct tb_conn *conn, __u32 membership, __u64 now)
{
	__u32 changes = conn->state / TB_MEMBERSHIPS + 1;

	conn->since = now;
	conn->state = changes * TB_MEMBERSHIPS + membership;
}

static __always_inline __u32 tb_control_flags(void)
{
	int zero = 0;
	struct tb_control *node = control.lookup(&zero);

	return node ? node->flags : TB_CONTROL_PAUSED;
}

/* Without a joiner no reader gets a fresh edge: edge.h. */
static __always_inline int tb_is_joiner_silent(__u64 now)
{
	int zero = 0;
	__u64 *last = beat.lookup(&zero);

	return last && *last && tb_has_passed(TB_SILENCE_S * NS_PER_S, *last, now);
}

static __always_inline int tb_is_paused(const struct tb_conn *conn)
{
	__u32 flags = tb_control_flags();

	if (flags & (TB_CONTROL_PAUSED | TB_CONTROL_LEAVE))
		return 1;
	return (flags & TB_CONTROL_PODS_PAUSED) &&
	       (paused_pods.lookup((__u64 *)&conn->me.pod_id) ||
		paused_pods.lookup((__u64 *)&conn->peer.pod_id));
}

/* What a thread has written before is seen by others, before what it reads from here on: to delete
 * takes the lock of a map's bucket. */
static __always_inline void tb_order_looks(void)
{
	__u64 none = 0;

	splicers.delete(&none);
}

static __always_inline __u64 tb_netns_cookie(__u64 sk)
{
	return tb_read64(tb_read64(sk + OFF_SOCK_NET) + OFF_NET_COOKIE);
}

/* RULE (splice). Has it been spliced from, or may it be at any time, since its pod does so? A
 * sidecar does not. */
static __always_inline int tb_has_spliced(const struct tb_conn *conn)
{
	__u64 cookie = conn->me.id >> TB_ID_SHIFT, netns = tb_netns_cookie(conn->me.sk);

	return splicers.lookup(&cookie) || (!conn->me.is_proxy && splicing.lookup(&netns));
}

/* A member of the peer's struct tb_conn. */
#define TB_PEERS(type, conn, member)                                                               \
	TB_READ(type, (conn)->peer.conn + offsetof(struct tb_conn, member))

/* ---- When a socket calls the programs ---- */

enum tb_calls {
	TB_CALL_NEVER,
	TB_CALL_PER_ROUND_TRIP = BPF_SOCK_OPS_RTT_CB_FLAG,
	/* Per packet that it sends, and when its state changes. */
	TB_CALL_PER_PACKET = BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG | BPF_SOCK_OPS_STATE_CB_FLAG,
};

/* Tells a client's socket from a server's later on: a flag for calls that come seldom. Flags stay
 * when the programs are loaded anew. */
#define TB_CLIENT BPF_SOCK_OPS_RTO_CB_FLAG
/* Tells one that is older than its pod's attachment: likewise. */
#define TB_OLDER BPF_SOCK_OPS_RETRANS_CB_FLAG

static __always_inline void tb_set_flags(struct bpf_sock_ops *skops, int flags)
{
	if (flags != skops->bpf_sock_ops_cb_flags)
		bpf_sock_ops_cb_flags_set(skops, flags);
}

/* Of these calls the socket now gets those alone, for all programs on the cgroup. */
static __always_inline void tb_call(struct bpf_sock_ops *skops, enum tb_calls when)
{
	int all = TB_CALL_PER_ROUND_TRIP | TB_CALL_PER_PACKET;

	tb_set_flags(skops, (skops->bpf_sock_ops_cb_flags & ~all) | when);
}

/* A connection is established, or the programs have been loaded anew since. Another program's calls
 * go on. */
static __always_inline void tb_begin(struct bpf_sock_ops *skops, int client)
{
	tb_set_flags(skops,
		     (skops->bpf_sock_ops_cb_flags & ~TB_CLIENT) | TB_CALL_PER_ROUND_TRIP | client);
}
