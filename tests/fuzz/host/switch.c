// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two ends of one paired connection around the real programs, for tests/fuzz/switch.py. PROGRAM is
 * their source as one text, or a mutant of it.
 */
#include PROGRAM

/* What tests/fuzz/switch.py says of an end: its class View has the same. */
struct host_view {
	__u32 write_seq, rcv_nxt, copied_seq, unacked;
	__u32 is_owned, is_asleep, is_nonblocking, is_corked, has_nodelay, has_options, has_ulp;
	__u32 state;
	__u32 inside;	  /* threads in a send or a read */
	__u32 has_unread; /* bypassed bytes */
};

struct host_end {
	struct host_sock sock;
	struct psock psock;
	struct wait_queue queue;
	struct waiter sleeper;
	__u64 sleeping; /* stands for its thread: where the stack is */
	struct host_socket socket;
	struct host_file file;
	struct list unread; /* stands for what is in the bypass queue */
	struct tb_conn conn;
	__u32 callbacks, edges, redirected, is_member;
};

static struct host_end ends[2];
static struct proto tcp_prot, member_prot, tls_prot;
static struct tb_control switches;
static __u64 last_beat;
static struct tb_due passes[2]; /* by pod */
static struct memcg container, pod;
static __u64 allocated, marks[3]; /* the kernel's memory for TCP, and net.ipv4.tcp_mem */
static __u64 under_pressure;
static struct host_net net = {{4096, 131072, 6 << 20}};

static struct tb_conn *storage_of(void *sk, void *value, int flags)
{
	(void)value, (void)flags;
	return &((struct host_end *)sk)->conn;
}

static struct host_end *with_id(__u64 id)
{
	return id == ends[0].conn.me.id ? &ends[0] : id == ends[1].conn.me.id ? &ends[1] : NULL;
}

static int redirect(void *msg, __u64 *id, int flags)
{
	struct host_end *from = (struct host_end *)((struct sk_msg_md *)msg)->sk,
			*to = with_id(*id);

	(void)flags;
	from->redirected = to && to->is_member;
	return from->redirected ? SK_PASS : SK_DROP;
}

static int add_to_sockhash(__u64 *id, void *socket)
{
	struct host_end *end = socket;

	(void)id;
	end->is_member = 1;
	end->sock.user_data = (__u64)&end->psock;
	end->sock.prot = (__u64)&member_prot;
	end->psock.refcnt = 1;
	return 0;
}

static int remove_from_sockhash(__u64 *id)
{
	struct host_end *end = with_id(*id);

	if (end)
		end->sock.user_data = end->is_member = 0;
	if (end && end->sock.prot == (__u64)&member_prot)
		end->sock.prot = (__u64)&tcp_prot;
	return 0;
}

static __u64 *beat_of(int *index)
{
	(void)index;
	return &last_beat;
}

static struct tb_control *control_of(int *index)
{
	(void)index;
	return &switches;
}

static struct tb_due *due_of(__u64 *pod_id)
{
	return &passes[*pod_id - 1];
}

static int ring(void *event, int size, int flags)
{
	(void)event, (void)size, (void)flags;
	return 0;
}

static __u32 *not_spliced(__u64 *cookie)
{
	(void)cookie;
	return NULL;
}

static int nothing_noted(__u64 *cookie)
{
	(void)cookie;
	return -1;
}

static struct tb_counters *not_counted(struct tb_counter_key *key)
{
	(void)key;
	return NULL;
}

static struct tb_counters *no_zeros(int *index)
{
	(void)index;
	return NULL;
}

/* Of both ends, as far as a paired connection asks. */
static struct tb_pod *any_pod(int index)
{
	static struct tb_pod record = {.id = 1};

	(void)index;
	return &record;
}

/* A paired connection just established; the first byte that end i says has number isn[i]. */
void host_connect(const __u32 isn[2], const __u32 is_proxy[2], __u32 pods_count, __u32 rcvbuf,
		  __u32 sndbuf)
{
	pods.get_local_storage = any_pod;
	conns.sk_storage_get = storage_of;
	sockhash.update = add_to_sockhash;
	sockhash.msg_redirect_hash = redirect;
	sockhash.delete = remove_from_sockhash;
	control.lookup = control_of;
	splicers.lookup = not_spliced;
	splicers.delete = nothing_noted;
	splicing.lookup = not_spliced;
	beat.lookup = beat_of;
	due.lookup = due_of;
	bell.ringbuf_output = ring;
	counters.lookup = not_counted;
	no_counters.lookup = no_zeros;
	memset(ends, 0, sizeof(ends));
	memset(&switches, 0, sizeof(switches));
	last_beat = 0;
	memset(passes, 0, sizeof(passes));
	allocated = under_pressure = 0;
	marks[0] = 1;
	tcp_prot = (struct proto){(__u64)&allocated, (__u64)&under_pressure, (__u64)marks};
	member_prot = tls_prot = tcp_prot;
	container = pod = (struct memcg){.memory = {.high = ~0ULL >> 13, .max = ~0ULL >> 13}};
	container.memory.parent = (__u64)&pod.memory;
	for (int i = 0; i < 2; i++) {
		struct host_end *end = &ends[i];

		end->queue.head.next = &end->queue.head;
		end->psock.ingress.next = &end->psock.ingress;
		end->socket.file = (__u64)&end->file;
		end->callbacks = BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
		end->sock = (struct host_sock){
			.wq = (__u64)&end->queue,
			.socket = (__u64)&end->socket,
			.prot = (__u64)&tcp_prot,
			.net = (__u64)&net,
			.memcg = (__u64)&container,
			.state = BPF_TCP_ESTABLISHED,
			.rcvbuf = rcvbuf,
			.sndbuf = sndbuf,
			.rcvlowat = 1,
			.peek_off = -1,
			.snd_una = isn[i] - (i == 0), /* the client counts its SYN */
			.rcv_nxt = isn[!i],
		};
		end->conn.me = (struct tb_end){.id = i + 1,
					       .sk = (__u64)&end->sock,
					       .conn = (__u64)&end->conn,
					       .pod_id = pods_count == 2 ? i + 1 : 1,
					       .is_proxy = is_proxy[i],
					       .is_client = i == 0};
		end->conn.half.client_isn = isn[0];
		end->conn.half.server_isn = isn[1];
		end->conn.wanted = TB_FIRST_WANTED;
		end->conn.moved.sent = isn[i];
		end->conn.moved.received = isn[!i];
	}
	for (int i = 0; i < 2; i++)
		ends[i].conn.peer = ends[!i].conn.me;
}

void host_set(int number, const struct host_view *view)
{
	struct host_end *end = &ends[number];
	__u32 acked = view->write_seq - view->unacked - end->sock.snd_una;

	end->sock.write_seq = view->write_seq;
	end->sock.snd_una += acked;
	end->sock.bytes_acked += acked;
	end->sock.rcv_nxt = view->rcv_nxt;
	end->sock.bytes_received =
		view->rcv_nxt - (number ? end->conn.half.client_isn : end->conn.half.server_isn);
	end->sock.copied_seq = view->copied_seq;
	end->sock.owned = view->is_owned;
	end->sock.nonagle = (view->has_nodelay ? MASK_TCP_NAGLE_OFF : 0) |
			    (view->is_corked ? MASK_TCP_NAGLE_CORK : 0);
	end->sock.rcvlowat = view->has_options ? 100 : 1;
	end->sock.ulp = view->has_ulp;
	if (view->has_ulp && end->is_member)
		end->sock.prot = (__u64)&tls_prot;
	end->sock.state = view->state;
	end->file.flags = view->is_nonblocking ? O_NONBLOCK : 0;
	end->psock.refcnt = view->inside + end->is_member;
	end->psock.ingress.next = view->has_unread ? &end->unread : &end->psock.ingress;
	end->sleeping = (__u64)&end->sleeper;
	end->sleeper.private = &end->sleeping;
	end->sleeper.entry.next = &end->queue.head;
	end->queue.head.next = view->is_asleep ? &end->sleeper.entry : &end->queue.head;
}

/* Another CPU's steps are to be taken before the `reads`-th look at the kernel's memory; 0: none.
 */
void host_interrupt(int reads, void (*meanwhile)(void))
{
	host_reads_left = reads;
	host_meanwhile = meanwhile;
}

void host_clock(__u64 now)
{
	host_now = now;
}

/* A joiner looks now. */
void host_beat(void)
{
	last_beat = host_now;
}

/* One message; 1: it goes by bypass. The caller moves the sequence numbers on. */
int host_send(int end, __u32 size)
{
	struct sk_msg_md msg = {.size = size};

	msg.sk = (struct bpf_sock *)&ends[end].sock;
	ends[end].redirected = 0;
	tb_sk_msg(&msg);
	return ends[end].redirected;
}

/* An end sends a packet by TCP. */
void host_packet(int end)
{
	struct bpf_sock_ops context = {.op = BPF_SOCK_OPS_HDR_OPT_LEN_CB,
				       .is_fullsock = 1,
				       .rcv_nxt = ends[end].sock.rcv_nxt,
				       .state = ends[end].sock.state,
				       .segs_in = 1000,
				       .bpf_sock_ops_cb_flags = ends[end].callbacks};

	context.sk = (struct bpf_sock *)&ends[end].sock;
	if (context.bpf_sock_ops_cb_flags & BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG)
		tb_sock_ops(&context);
	context.op = BPF_SOCK_OPS_RTT_CB; /* its acknowledgement comes at once */
	if (context.bpf_sock_ops_cb_flags & BPF_SOCK_OPS_RTT_CB_FLAG)
		tb_sock_ops(&context);
	ends[end].callbacks = context.bpf_sock_ops_cb_flags;
}

void host_visit(int end)
{
	struct host_sock *sock = &ends[end].sock;

	if (tb_visit(sock, (__u64)sock) & TB_NEEDS_EDGE)
		ends[end].edges += sock->rcv_nxt != sock->copied_seq; /* tcp_data_ready() */
}

/* Is a pass over this end's pod due? It will be begun. */
int host_begin_pass(int end)
{
	struct tb_due *due = &passes[ends[end].conn.me.pod_id - 1];
	int pending = due->pending;

	due->pending = 0;
	return pending;
}

void host_control(__u32 flags)
{
	switches.flags = flags;
}

/* enum tb_membership, as the programs know it. */
int host_membership(int end)
{
	return tb_membership(ends[end].conn.state);
}

/* Is it in the sockhash? */
int host_is_member(int end)
{
	return ends[end].is_member;
}

/* How many new edges passes have made. */
int host_edges(int end)
{
	return ends[end].edges;
}

/* Another connection's numbers: what a socket has that was used again behind our backs. */
void host_renumber(int end)
{
	ends[end].sock.snd_una++;
}

/* An end has closed, and its memory is another's. */
void host_close(int end)
{
	ends[end].conn.me.id = 0;
}

/* An end's peer is another one, as it says. */
void host_estrange(int end)
{
	ends[end].conn.peer.id = 99;
}

/* Another program's sockmap takes the socket. */
void host_occupy(int end)
{
	ends[end].sock.user_data = (__u64)&ends[end].psock;
}

/* How much TCP has offered to take. */
void host_offer(int end, __u32 window)
{
	ends[end].sock.rcv_wnd = window;
}

void host_memory_pressure(int pressure)
{
	allocated = pressure;
	under_pressure = pressure > 0;
}

/* Of both ends' container or of the pod above it, in pages. */
void host_limit_memory(int of_pod, __u64 limit, __u64 usage, __u64 cached)
{
	struct memcg *memcg = of_pod ? &pod : &container;

	*(of_pod ? &memcg->memory.high : &memcg->memory.max) = limit; /* either stops it */
	memcg->memory.usage = usage;
	memcg->vmstats = (__u64)&memcg->cached;
	memcg->cached = cached;
}
