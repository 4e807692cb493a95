// SPDX-License-Identifier: GPL-2.0-only
/*
 * The data path. Seven programs share the maps of data_path/state.h:
 *
 *   tb_sock_ops     runs for the TCP sockets of an accelerated pod's cgroup. It finds the two
 *                   sockets that are one connection, and counts what they exchange.
 *   tb_visit_file   visits the open files of a pod's processes when a pass is due. It puts paired
 *                   sockets into the sockhash, and takes them out again.
 *   tb_visit_socket does that for one socket, where tb_visit_file must only name it (lookup.h).
 *   tb_sk_msg       runs for each message sent on a socket in the sockhash. It redirects the bytes
 *                   to the peer's socket (bypass), or lets them go by TCP. The kernel does not ask
 *                   it for the one after a message by TCP that found no room: that goes by TCP.
 *   tb_refuse_splice runs when a file is read, and refuses splice(2), where it can be attached.
 *   tb_mend         runs after ioctl(FIONREAD), where the kernel's own answer is wrong.
 *   tb_take_in      runs for sockets that are older than the program on their pod's cgroup.
 *
 * The rules that keep the bytes right, each where it is applied:
 *
 *   reads        kernel memory of others decides whether to redirect, never where to    kernel.h
 *   identity     two sockets are one connection if their initial numbers mirror        pairing.h
 *                through a Service, the server's pod has proved itself                services.h
 *   state        a socket's memory is written for that socket alone                    state.h
 *   readers      no socket with a reader that may sleep in recv is a member           readers.h
 *   Nagle        an end that waits for acknowledgements gets them at once             readers.h
 *   splice       no socket that has spliced joins, and no member splices               splice.h
 *   short sends  no socket joins on which sendmmsg or io_uring sends                    sends.h
 *   urgent       an urgent byte goes by TCP                                            sends.h
 *   one queue    a direction changes its path only while the old one is empty           order.h
 *   lock         no redirect begins while an application's socket lock is taken         order.h
 *   half-closed  after the first FIN, TCP                                               order.h
 *   conntrack    one message in a second goes by TCP                                    order.h
 *   bound        a peer has unread only what its TCP finds room beside                 unread.h
 *   memory       and only a share of what its container has free                       unread.h
 *   edges        an edge-triggered reader gets a new edge for bytes behind others       edge.h
 *   joining      only a socket that is known joins, while no call on it is under way  joining.h
 *   leaving      no byte unread, no redirect on its way                               joining.h
 *   ULP          a member that got a ULP as it joined stays, on TCP                    joining.h
 *   lookup       what is visited by its addresses is the socket that was named         lookup.h
 *   fionread     FIONREAD says what TCP would                                         fionread.h
 *
 * Compiled on the node by bcc, as one text with the headers (bpf/loader.py).
 */
#include <uapi/linux/bpf.h>
#include "tcpip_bypass.h"
#include "data_path/kernel.h"
#include "data_path/state.h"
#include "data_path/policy.h"
#include "data_path/counters.h"
#include "data_path/due.h"
#include "data_path/services.h"
#include "data_path/pairing.h"
#include "data_path/readers.h"
#include "data_path/sends.h"
#include "data_path/unread.h"
#include "data_path/order.h"
#include "data_path/edge.h"
#include "data_path/known.h"
#include "data_path/joining.h"
#include "data_path/lookup.h"
#include "data_path/splice.h"
#include "data_path/fionread.h"

/*
 * RULE (identity). The socket disconnected (AF_UNSPEC) and is used again. What lies unread in its
 * bypass queue belongs to the old connection, and its peer may not have heard of the end. Leaving
 * the sockhash throws the queue away and makes the old id unreachable. The id goes first: a visit
 * that is putting the socket into the sockhash looks at it afterwards, and takes it out again.
 */
static __always_inline void tb_use_again(struct bpf_sock_ops *skops, struct tb_conn *conn)
{
	__u64 id = conn->me.id;

	*(volatile __u64 *)&conn->me.id = 0;
	if (id)
		sockhash.delete(&id);
	conn->token = 0;
	tb_set_membership(conn, TB_OUT, tb_tick_ns());
	tb_call(skops, TB_CALL_NEVER);
}

/*
 * The connection has ended, be it by RST, and the application may still hold the socket. A socket
 * in a sockhash would report a reset at each send (tcp_bpf_sendmsg), TCP reports it once. Not while
 * bypassed bytes lie unread: those can still be read, and a pass takes it out afterwards. Nor ever
 * under RULE (ULP).
 */
static __always_inline void tb_end_connection(struct tb_conn *conn)
{
	if (tb_membership(conn->state) == TB_OUT || tb_must_stay(conn, conn->me.sk))
		return;
	if (!tb_is_empty(conn->at.psock))
		return tb_ring(conn->me.pod_id);
	sockhash.delete(&conn->me.id);
	tb_set_membership(conn, TB_OUT, tb_tick_ns());
}

/* Callbacks of a socket that may have been paired. */
static __always_inline void tb_go_on(struct bpf_sock_ops *skops)
{
	struct tb_conn *conn = tb_conn_of(skops);

	/* It is to be paired anew: the programs have been loaded since. */
	if (!conn && skops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB)
		return tb_begin(skops, skops->bpf_sock_ops_cb_flags & TB_CLIENT);
	if (!conn)
		return;
	if (skops->op == BPF_SOCK_OPS_TCP_CONNECT_CB || skops->op == BPF_SOCK_OPS_TCP_LISTEN_CB)
		return tb_use_again(skops, conn);
	if (!conn->me.id)
		return;
	if (skops->op == BPF_SOCK_OPS_STATE_CB) {
		tb_flush_tally(conn);
		if (skops->args[1] == BPF_TCP_CLOSE)
			tb_end_connection(conn);
		return;
	}
	if (tb_membership(conn->state) == TB_OUT)
		tb_wait_to_join(skops, conn);
	else
		tb_note_unasked(conn, skops->state);
}

/* Attached to the pod's cgroup. Must return 1, and must not touch skops->reply: other programs on
 * the same cgroup answer RWND_INIT and the like with it. */
int tb_sock_ops(struct bpf_sock_ops *skops)
{
	int is_of_socket = skops->op == BPF_SOCK_OPS_STATE_CB ||
			   (skops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB && skops->is_fullsock);
	struct tb_pod *pod;

	if (is_of_socket || skops->op == BPF_SOCK_OPS_TCP_CONNECT_CB ||
	    skops->op == BPF_SOCK_OPS_TCP_LISTEN_CB)
		tb_go_on(skops);
	if (is_of_socket)
		return 1;
	pod = (struct tb_pod *)(long)pods.get_local_storage(0);
	if (!pod || !pod->id)
		return 1;
	if (pod->flags & TB_POD_SERVICES)
		tb_serve_services(skops, pod);
	if (skops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		tb_begin(skops, TB_CLIENT);
	else if (skops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		tb_begin(skops, 0);
	else if (skops->op == BPF_SOCK_OPS_RTT_CB)
		tb_complete_round_trip(skops, pod);
	return 1;
}

/* Attached to the sockhash. Always SK_PASS: any other verdict fails the application's send. */
int tb_sk_msg(struct sk_msg_md *msg)
{
	struct bpf_sock *sk = msg->sk;
	struct tb_conn *conn;
	const void *tp;

	if (!sk)
		return SK_PASS;
	conn = conns.sk_storage_get(sk, 0, 0);
	if (!conn)
		return SK_PASS;
	tp = TB_TCP_SOCK(sk, conn->me.sk);
	if (tp)
		tb_send(msg, conn, tp);
	return SK_PASS;
}

/*
 * An iterator over the open files of a process. Its context (struct bpf_iter__task_file,
 * kernel/bpf/task_iter.c) has meta, the task, the file's number and the file. Meta begins with the
 * struct seq_file to write to. The program writes a __u32 for each file whose reader needs a new
 * edge (edge.h): the file's number. For each socket that needs another visit to leave, it writes
 * TB_VISIT_AGAIN.
 */
#ifndef TB_BY_LOOKUP
int tb_visit_file(__u64 *context)
{
	void *meta = (void *)context[0], *file = (void *)context[3], *socket;
	__u32 fd = context[2], again = TB_VISIT_AGAIN;
	int found;

	tb_end_read(meta);
	if (!file)
		return 0;
	socket = tb_sock_from_file(file);
	if (!socket)
		return 0;
	socket = *(void *volatile *)(socket + OFF_SOCKET_SK); /* its struct sock */
	if (socket)
		socket = bpf_skc_to_tcp_sock(socket); /* NULL for all but TCP's */
	if (!socket)
		return 0;
	found = tb_visit(socket, (__u64)socket);
	if (found & TB_NEEDS_EDGE)
		bpf_seq_write(*(void *volatile *)meta, &fd, sizeof(fd));
	if (found & TB_NEEDS_VISIT)
		bpf_seq_write(*(void *volatile *)meta, &again, sizeof(again));
	return 0;
}
#endif

#define IPPROTO_TCP 6		       /* also the level of its options */
#define TCP_BPF_SOCK_OPS_CB_FLAGS 1008 /* linux/bpf.h, since Linux 6.12 */

/*
 * Attached to the cgroup of a pod that was running before it was accelerated, while the node
 * program sets our option on each of its sockets. Those that are established get their callbacks
 * from now on (tb_begin()), and are paired as new ones. Runs under the socket's lock. Before Linux
 * 6.12 the callbacks are refused, and so is our option, by the kernel itself.
 */
int tb_take_in(struct bpf_sockopt *option)
{
	__u32 flags = TB_CALL_PER_ROUND_TRIP | TB_OLDER, in_flight;
	struct bpf_sock *socket = option->sk;
	__u64 sk = 0, sent;

	if (option->level != IPPROTO_TCP || option->optname != TB_TAKE_IN || !socket ||
	    socket->protocol != IPPROTO_TCP || socket->state != BPF_TCP_ESTABLISHED)
		return 1;
	tb_probe_read_kernel(&sk, sizeof(sk), (void *)option + OFF_SOCKOPT_SK);
	if (tb_read8(sk + OFF_TCP_SOCK_CALLS))
		return 1;
	/* An active opener's SYN was acknowledged, too, and was no data that it has sent. */
	in_flight = tb_read32(sk + OFF_TCP_SOCK_SND_NXT) - tb_read32(sk + OFF_TCP_SOCK_SND_UNA);
	sent = tb_read64(sk + OFF_TCP_SOCK_BYTES_SENT) - tb_read64(sk + OFF_TCP_SOCK_BYTES_RETRANS);
	if (tb_read64(sk + OFF_TCP_SOCK_BYTES_ACKED) + in_flight == sent + 1)
		flags |= TB_CLIENT;
	if (!bpf_setsockopt(socket, IPPROTO_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, &flags, sizeof(flags)))
		option->optlen = -1; /* done: the kernel is not asked */
	return 1;
}
