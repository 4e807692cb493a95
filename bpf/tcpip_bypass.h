/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What crosses the border between the BPF programs and user space: the one
 * definition of every struct, enum and map name. bpf/abi.py is Python's
 * view of this file; tests/unit/test_abi.py holds the two together.
 *
 * Members are ordered so that no compiler adds padding: a hash key with padding
 * has bytes never written, and then equal keys do not compare equal.
 */
#ifndef TCPIP_BYPASS_H
#define TCPIP_BYPASS_H

#include <linux/types.h>

#define TB_MAX_IPS 8
#define TB_MAX_PORT_RANGES 16
#define TB_FIRST_COST 500 /* what a first pass is taken to cost, in exchanges */
#define TB_SILENCE_S 5	  /* after so long without a joiner all bytes go by TCP */

/* An IPv6 address in network byte order; IPv4 a.b.c.d is ::ffff:a.b.c.d. */
struct tb_addr {
	__u32 word[4];
};

/* Inclusive, host byte order. */
struct tb_port_range {
	__u16 first;
	__u16 last;
};

/* tb_pod.flags */
enum tb_pod_flag {
	TB_POD_PROXY_ONLY = 1, /* accelerate only connections between two sidecars */
	TB_POD_FORCED = 2,     /* the configuration forces the mode: `load` leaves it be */
	TB_POD_SERVICES = 4,   /* pairs through a Service's address translation, too: no sidecar */
};

/*
 * Map "pods" (BPF_MAP_TYPE_CGROUP_STORAGE): what ADD tells the programs about
 * the pod whose cgroup they run for. All zero (id 0) until ADD has written it,
 * and such a pod is left alone.
 */
struct tb_pod {
	__u64 id; /* unique per attachment, cni_plugin/attachment.py: pod_id() */
	__u32 flags;
	__u32 proxy_uid;  /* the sidecar's user, as the host counts uids */
	__u32 reserved_1; /* keeps the first edition's layout: an upgrade reads its records */
	__u32 ip_count;
	__u32 excluded_count;
	__u32 netns;		       /* inode of the network namespace; 0: not known */
	struct tb_addr ip[TB_MAX_IPS]; /* ip[0] names the pod's network namespace */
	struct tb_port_range excluded[TB_MAX_PORT_RANGES];
};

/* tb_control.flags */
enum tb_control_flag {
	TB_CONTROL_PAUSED = 1,	    /* from the next message on, every byte goes by TCP */
	TB_CONTROL_PODS_PAUSED = 2, /* so do those to and from pods in map "paused_pods" */
	TB_CONTROL_LEAVE = 4,	    /* paused, and visits take every socket out of the sockhash */
	TB_CONTROL_TRIAL = 8,	    /* paused by a measurement, which will resume */
};

/* Map "control" (BPF_MAP_TYPE_ARRAY, one element): the node's switch. Map "paused_pods"
 * (BPF_MAP_TYPE_HASH) has the __u64 pod IDs of single pods that are paused, with a __u32 of 1. */
struct tb_control {
	__u32 flags;
	__u32 reserved;
};

/* Which of the hops of a request a connection is; docs/operating.md names them. */
enum tb_hop {
	TB_HOP_NONE,	 /* not paired, so not known */
	TB_HOP_INBOUND,	 /* sidecar -> application, in one pod */
	TB_HOP_OUTBOUND, /* application -> sidecar, in one pod */
	TB_HOP_SIDECARS, /* sidecar -> sidecar, between two pods */
	TB_HOP_LOCAL,	 /* any other connection inside one pod */
	TB_HOP_DIRECT,	 /* any other connection between two pods */
};

/* Why a message went by TCP after all. */
enum tb_reason {
	TB_REASON_NONE,	       /* it did not */
	TB_REASON_WAITING,     /* an end has not joined yet, or the joiner is silent */
	TB_REASON_LEAVING,     /* an end is not in the sockhash any more, or about to leave it */
	TB_REASON_ORDER,       /* the peer may still read earlier TCP bytes, or sleep for them */
	TB_REASON_BACKLOG,     /* the peer would have more unread than tb_bound() */
	TB_REASON_BLOCKING,    /* the peer's file is blocking: its reader may sleep in recv */
	TB_REASON_BUSY,	       /* a thread of the peer, an application, owns the socket's lock */
	TB_REASON_MEMORY,      /* the kernel is short of memory for TCP, or the peer's container */
	TB_REASON_CORKED,      /* TCP_CORK: the sender wants it held back */
	TB_REASON_STREAM,      /* much was sent without an answer */
	TB_REASON_REFRESH,     /* one message in a second: conntrack; or it must acknowledge */
	TB_REASON_PAUSED,      /* the operator paused the bypass */
	TB_REASON_HALF_CLOSED, /* one end has shut down or closed */
	TB_REASON_INELIGIBLE, /* an end got a ULP or an option after it joined, or sends urgently */
	TB_REASONS,
};

/* What became of a connection of an accelerated pod. */
enum tb_outcome {
	TB_OUTCOME_NONE,
	TB_OUTCOME_PAIRED,     /* both ends are known; counted once at each end */
	TB_OUTCOME_NO_PEER,    /* the other end is no accelerated socket of this node */
	TB_OUTCOME_MISMATCH,   /* sequence numbers met, addresses did not fit, or came twice */
	TB_OUTCOME_EXCLUDED,   /* a port was opted out, or the pod is proxy-only */
	TB_OUTCOME_INELIGIBLE, /* paired, but MPTCP, a ULP, SO_ZEROCOPY, or as it sends: sends.h */
	TB_OUTCOME_BLOCKING,   /* paired, but an end's file is blocking: its reader may sleep */
	TB_OUTCOME_OPTIONS,    /* paired, but an end set an option: tb_has_options() */
	TB_OUTCOME_SPLICE,     /* paired, but an end has spliced from its socket */
	TB_OUTCOME_STREAM,     /* paired, but its exchanges are large: they go by TCP as fast */
	TB_OUTCOME_NAGLE,      /* paired, but without TCP_NODELAY, RULE (Nagle), or it corks */
	TB_OUTCOME_BUSY,       /* paired, but another program's sockmap has the socket */
	TB_OUTCOME_FULL,       /* a map was full or memory short */
	TB_OUTCOMES,
};

/*
 * Map "due" (BPF_MAP_TYPE_HASH, by __u64 pod ID): when a pass over a pod's processes is worth
 * its cost. Ring buffer "bell" gets `edge` when it or `pending` is set.
 */
struct tb_due {
	__u64 missed; /* exchanges that waiting connections have made by TCP since the last pass */
	__u64 cost;   /* what a pass costs there, in exchanges; the joiner measures it */
	__u32 pending;
	__u32 edge; /* a reader may need a new edge (edge.h): a budget of its own pays the pass */
};

/* Map "fionread" (BPF_MAP_TYPE_ARRAY, one element): how the mend of FIONREAD fares. */
struct tb_fionread {
	__u64 lost; /* answers that could not be written */
};

/* What a visit writes for a process with a socket that needs another visit to leave. */
#define TB_VISIT_AGAIN 0xffffffff

/* What it writes now and then for the visitor's read(2) to return. */
#define TB_NO_FILE 0xfffffffd

/* The visit to a file writes this where it may not go on to the file's socket: lookup.h. */
#define TB_LOOK_UP 0xfffffffe

/* The socket that tb_visit_socket() is to visit. That program reads it behind an Ethernet header.
 */
struct tb_found {
	__u32 mark; /* TB_LOOK_UP */
	__u32 fd;
	__u32 visitor; /* the kernel's ID of program tb_visit_socket */
	__u32 netns;   /* the inode number of its network namespace */
	__u64 sk;      /* where it lies in the kernel */
	__u64 cookie;  /* SO_COOKIE */
	/* From here on as in struct bpf_sock_tuple, in network byte order. */
	struct tb_addr peer;
	struct tb_addr own;
	__u16 peer_port;
	__u16 own_port;
	__u32 device; /* the number of the one that it is bound to; 0: none */
};

/* What a socket needs after a visit. */
enum tb_needs {
	TB_NEEDS_EDGE = 1,  /* its reader needs a new edge: edge.h */
	TB_NEEDS_VISIT = 2, /* its next step on its way out may follow at once */
};

/* setsockopt(SOL_TCP): lets a connection from before be paired. No option of TCP's. */
#define TB_TAKE_IN 0x74620001

/* A value of map "conns" begins with an id. This one is of a socket by which the joiner sees
 * whether FIONREAD is mended: the mend gives it this answer. */
#define TB_CANARY 0x7fffffffffffffffULL
#define TB_CANARY_ANSWER 20263

/* Map "counters" (BPF_MAP_TYPE_PERCPU_HASH). */
struct tb_counter_key {
	__u64 pod_id;
	__u32 hop;
	__u32 reserved;
};

struct tb_counters {
	__u64 bypassed_messages;
	__u64 bypassed_bytes;
	__u64 tcp_messages[TB_REASONS];
	__u64 tcp_bytes;
	__u64 connections[TB_OUTCOMES]; /* of those that were never paired: under TB_HOP_NONE */
	__u64 joined;			/* sockets put into the sockhash */
	__u64 left;			/* and taken out while open */
};

#endif
