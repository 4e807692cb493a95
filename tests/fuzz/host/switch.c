// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two ends of one connection around the real tb_sk_msg, for tests/fuzz/switch.py. PROGRAM is
 * bpf/tcpip_bypass.c, or a mutant of it.
 */
#include PROGRAM

struct host_end {
	struct host_sock sock;
	struct psock psock;
	struct wait_queue queue;
	struct waiter sleeper;
	struct socket socket;
	struct file file;
	struct list unread[2]; /* one stands for the oldest message in the bypass queue */
	struct tb_conn conn;
	__u32 callbacks;
	__u32 mss;
};

static struct host_end ends[2];
static struct proto proto, tls_proto;
static struct tb_control switches;
static struct memcg container, pod;
static struct host_net net = {{4096, 131072, 6 << 20}};
static __u64 steps_taken;
static int redirected;

static struct tb_conn *storage_of(void *sk, void *value, int flags)
{
	(void)value, (void)flags;
	return &((struct host_end *)sk)->conn;
}

static int redirect(void *msg, __u64 *id, int flags)
{
	(void)msg, (void)flags;
	redirected = *id == ends[0].conn.me.id || *id == ends[1].conn.me.id;
	return redirected ? SK_PASS : SK_DROP;
}

static int remove_from_sockhash(__u64 *id)
{
	for (int i = 0; i < 2; i++)
		if (ends[i].conn.me.id == *id)
			ends[i].sock.prot = ends[i].sock.user_data = 0;
	return 0;
}

static struct tb_control *control_of(int *index)
{
	(void)index;
	return &switches;
}

static __u64 *steps_of(int *index)
{
	(void)index;
	return &steps_taken;
}

static struct tb_counters *not_counted(struct tb_counter_key *key)
{
	(void)key;
	return 0;
}

/* An established connection; the sequence number of the first byte that end i says is isn[i].
 * gathers: what makes its small writes gather. 1: pacing; 2: Nagle's algorithm; 3: a window of few
 * packets; 0: nothing those below TB_TINY. */
void host_connect(const __u32 isn[2], const __u32 is_proxy[2], const __u32 flags[2],
		  const __u32 gathers[2], __u32 rcvbuf, __u32 sndbuf)
{
	conns.sk_storage_get = storage_of;
	sockhash.msg_redirect_hash = redirect;
	sockhash.delete = remove_from_sockhash;
	control.lookup = control_of;
	steps.lookup = steps_of;
	counters.lookup = not_counted;
	memset(ends, 0, sizeof(ends));
	memset(&switches, 0, sizeof(switches));
	steps_taken = 0;
	proto.memory_pressure = 0;
	container = pod = (struct memcg){.memory = {.max = ~0ULL >> 13}};
	container.memory.parent = (__u64)&pod.memory;
	for (int i = 0; i < 2; i++) {
		struct host_end *end = &ends[i];

		end->sock.wq = (__u64)&end->queue;
		end->sock.socket = (__u64)&end->socket;
		end->socket.file = (__u64)&end->file;
		end->queue.head.next = &end->queue.head;
		end->psock.ingress.next = &end->psock.ingress;
		end->psock.refcnt = 2;
		end->sock.prot = (__u64)&proto;
		end->sock.user_data = (__u64)&end->psock;
		end->callbacks = end->conn.called = TB_WHILE_JOINED;
		end->sock.net = (__u64)&net;
		end->sock.state = TCP_ESTABLISHED;
		end->sock.memcg = (__u64)&container;
		end->sock.rcvbuf = rcvbuf;
		end->sock.sndbuf = sndbuf;
		end->file.flags = flags[i];
		end->sock.rcvlowat = 1;
		end->sock.pacing = gathers[i] == 1;
		end->sock.nonagle = gathers[i] == 2 ? 0 : MASK_TCP_NAGLE_OFF;
		end->sock.cwnd_clamp = TB_OWN_WINDOW;
		end->mss = gathers[i] == 3 ? 65483 : 1448; /* lo's, or that of an address beyond */
		end->sock.write_seq = end->conn.first = isn[i];
		end->sock.copied_seq = isn[!i];
		end->conn.pressure = (__u64)&proto.memory_pressure;
		end->conn.me = (struct tb_end){.id = i + 1,
					       .sk = (__u64)&end->sock,
					       .psock = (__u64)&end->psock,
					       .conn = (__u64)&end->conn,
					       .prot = (__u64)&proto,
					       .is_proxy = is_proxy[i]};
	}
	for (int i = 0; i < 2; i++)
		ends[i].conn.peer = ends[!i].conn.me;
}

/* One message; 1: it goes by bypass. The caller moves the sequence numbers on. */
int host_send(int end, __u32 size, __u64 thread)
{
	struct sk_msg_md msg = {.size = size};

	msg.sk = (struct bpf_sock *)&ends[end].sock;
	host_thread = thread;
	redirected = 0;
	tb_sk_msg(&msg);
	return redirected;
}

static void called_for(int end, int flag, void (*program)(struct bpf_sock_ops *, struct tb_conn *))
{
	struct bpf_sock_ops context = {.bpf_sock_ops_cb_flags = ends[end].callbacks,
				       .mss_cache = ends[end].mss};

	if (context.bpf_sock_ops_cb_flags & flag)
		program(&context, &ends[end].conn);
	ends[end].callbacks = context.bpf_sock_ops_cb_flags;
}

/* An end sends a packet by TCP. */
void host_transmits(int end)
{
	called_for(end, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG, tb_follow);
}

/* Bytes of an end's were acknowledged. */
void host_acknowledged(int end)
{
	called_for(end, BPF_SOCK_OPS_RTT_CB_FLAG, tb_data_acknowledged);
}

int host_is_called(int end)
{
	return ends[end].callbacks != 0;
}

int host_is_in_sockhash(int end)
{
	return ends[end].sock.user_data != 0;
}

/* fcntl(O_NONBLOCK), also while a thread sleeps in recv. */
void host_make_nonblocking(int end)
{
	ends[end].file.flags = O_NONBLOCK;
}

/* Whether the application has accepted this end, so that it has a file. */
void host_accept(int end, int accepted)
{
	ends[end].sock.socket = accepted ? (__u64)&ends[end].socket : 0;
}

/* shutdown(SHUT_WR), and the FIN has arrived. */
void host_shut(int end)
{
	ends[end].sock.state = 5;  /* FIN_WAIT2 */
	ends[!end].sock.state = 8; /* CLOSE_WAIT */
}

/* How much TCP has offered to take. */
void host_offer(int end, __u32 window)
{
	ends[end].sock.rcv_wnd = window;
}

/* setsockopt(TCP_ULP, "tls"), which some kernels allow in a sockhash. */
void host_encrypt(int end)
{
	ends[end].sock.ulp = 1;
	ends[end].sock.prot = (__u64)&tls_proto;
}

/* oldest: 1 or 2, by where it lies in memory; 0: the bypass queue is empty. */
void host_set(int end, __u32 write_seq, __u32 copied_seq, __u32 lowat, __u32 owned, __u32 refcnt,
	      int asleep, int oldest)
{
	struct host_end *it = &ends[end];

	it->sock.write_seq = write_seq;
	it->sock.copied_seq = copied_seq;
	it->sock.rcvlowat = lowat;
	it->sock.owned = owned;
	it->psock.refcnt = refcnt;
	it->psock.ingress.next = oldest ? &it->unread[oldest - 1] : &it->psock.ingress;
	it->sleeper.private = it;
	it->sleeper.entry.next = &it->queue.head;
	it->queue.head.next = asleep ? &it->sleeper.entry : &it->queue.head;
}

void host_pause(int paused)
{
	switches.flags = paused ? TB_CONTROL_PAUSED : 0;
}

/* The application sets SO_RCVBUF. */
void host_set_rcvbuf(int end, __u32 rcvbuf)
{
	ends[end].sock.rcvbuf = rcvbuf;
	ends[end].sock.userlocks |= MASK_SOCK_RCVBUF_LOCK;
}

void host_memory_pressure(int pressure)
{
	proto.memory_pressure = pressure;
}

/* Of both ends' container or of the pod above it, in pages. */
void host_limit_memory(int pods, __u64 limit, __u64 usage, __u64 cached)
{
	struct memcg *memcg = pods ? &pod : &container;

	memcg->memory.max = limit;
	memcg->memory.usage = usage;
	memcg->cached = cached;
}

__u32 host_mark(int end)
{
	return ends[end].conn.rx_mark;
}
