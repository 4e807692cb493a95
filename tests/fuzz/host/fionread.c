// SPDX-License-Identifier: GPL-2.0-only
/*
 * One member of the sockhash around tb_mend(), for tests/fuzz/test_fionread.py. PROGRAM is the
 * programs' source as one text.
 */
#include PROGRAM

#define MESSAGES 64

static struct host_sock sock;
static struct psock psock;
static struct host_socket of_file = {.sk = (__u64)&sock};
static struct tb_conn conn;
static struct host_message messages[MESSAGES];
static struct host_message *unused[MESSAGES]; /* the one that was freed last is used next */
static struct list *tail;
static int free_count;
static struct tb_fionread counted;

static struct tb_conn *storage_of(void *sk, void *value, int flags)
{
	(void)sk, (void)value, (void)flags;
	return &conn;
}

static struct tb_fionread *counted_of(int *index)
{
	(void)index;
	return &counted;
}

static int bpf_getsockopt(struct bpf_sock_ops *context, int level, int name, int *value, int size)
{
	return bpf_setsockopt(context, level, name, value, size);
}

/* A member without any byte unread. */
void host_reset(__u32 seq)
{
	conns.sk_storage_get = storage_of;
	fionread.lookup = counted_of;
	psock = (struct psock){.ingress.next = &psock.ingress};
	sock = (struct host_sock){
		.user_data = (__u64)&psock, .rcv_nxt = seq, .copied_seq = seq, .urg_seq = seq};
	conn = (struct tb_conn){
		.me = {.id = 1, .sk = (__u64)&sock},
	};
	conn.at.psock = (__u64)&psock;
	tail = &psock.ingress;
	for (free_count = 0; free_count < MESSAGES; free_count++)
		unused[free_count] = &messages[free_count];
	host_reads_left = 0;
}

/* A bypassed message is queued. */
void host_queue(__u32 size)
{
	struct host_message *message = unused[--free_count];

	message->size = size;
	message->list.next = &psock.ingress;
	tail->next = &message->list;
	tail = &message->list;
	psock.msg_tot_len += size;
}

/* A thread reads so many bypassed bytes; what it has read whole is freed, and written over. */
void host_read_bypassed(__u32 size)
{
	psock.msg_tot_len -= size;
	while (size) {
		struct list *first = psock.ingress.next;
		struct host_message *message =
			(void *)((char *)first - offsetof(struct host_message, list));
		__u32 part = tb_min(size, message->size);

		message->size -= part;
		size -= part;
		if (message->size)
			continue;
		psock.ingress.next = first->next;
		if (tail == first)
			tail = &psock.ingress;
		message->size = 0x6b6b6b6b;
		first->next = (struct list *)0x6b;
		unused[free_count++] = message;
	}
}

void host_read_tcp(__u32 size)
{
	sock.copied_seq += size;
}

/* A packet is received: its bytes, and then what its FIN means, under the spinlock. */
void host_receive(__u32 size)
{
	sock.rcv_nxt += size;
}

void host_lock(int locked)
{
	sock.spinlock = locked;
}

void host_end_stream(void)
{
	sock.flags |= 1 << BIT_SOCK_DONE;
}

void host_urgent(__u32 seq, int is_inline)
{
	sock.urg_seq = seq;
	sock.urg_data = 0x100;
	sock.flags |= is_inline << BIT_SOCK_URGINLINE;
}

/* The socket has left, another program's sockmap has it then, it joins anew; it never joined. */
void host_leave(void)
{
	sock.user_data = 0;
}

void host_occupy(void)
{
	sock.user_data = (__u64)&sock;
}

void host_join(void)
{
	conn.at.psock = TB_JOINING;
}

void host_forget(void)
{
	conn.at.psock = 0;
}

void host_mark(void)
{
	conn.me.id = TB_CANARY;
}

void host_interrupt(int reads, void (*meanwhile)(void))
{
	host_reads_left = reads;
	host_meanwhile = meanwhile;
}

/* What an ioctl says whose own answer is `answer`; `result` is what it returns. */
int host_ioctl(__u32 command, int answer, int result)
{
	__u64 context[] = {(__u64)&of_file, command, (__u64)&answer, (__u64)result};

	tb_mend(context);
	return answer;
}
