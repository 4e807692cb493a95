/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Connections through a Service's address translation.
 *
 * RULE (identity). Where a Service's address was dialled, the node's address translation chooses
 * the server, and the client cannot tell which pod that is. So the server's pod proves
 * itself: its SYN-ACK has a token, a MAC (SipHash-2-4) over the connection and the pod, under a
 * secret that never leaves the kernel. The SYN-ACK takes the way that the node's own rules gave it.
 * A pod that did not get this very SYN cannot make the token, and one token fits one connection.
 */

/* A TCP option for experiments (RFC 6994), in SYN-ACKs between two accelerated pods of one node. */
struct tb_option {
	__u8 kind;
	__u8 length;
	__u8 id[2];
	__u8 token[8];
};

#define TB_OPTION_KIND 253
#define TB_OPTION_ID 't', 'b'

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

/* The client says that its SYN comes from this node: no other peer gets to see the option. */
static __always_inline void tb_note_dial(struct bpf_sock_ops *skops)
{
	__u64 sk = tb_context_sock(skops);
	struct tb_dial dial = {};
	__u32 one = 1;

	TB_ADDR(skops, local, &dial.client);
	dial.client_isn = tb_read32(sk + OFF_TCP_SOCK_WRITE_SEQ) + 1;
	dials.update(&dial, &one);
}

/* A SYN-ACK is being made: fills the key of its connection, all but `netns`. Returns 1 if the SYN
 * came from this node, and to a port that is not excluded. */
static __always_inline int tb_find_dial(struct bpf_sock_ops *skops, const struct tb_pod *pod,
					struct tb_half_key *key)
{
	__u64 request = tb_context_sock(skops);
	struct tb_dial dial = {};

	if (skops->is_fullsock || tb_pod_excludes(pod, skops->local_port))
		return 0;
	TB_ADDR(skops, remote, &key->client);
	key->client_isn = tb_read32(request + OFF_TCP_REQUEST_RCV_ISN) + 1;
	key->server_isn = tb_read32(request + OFF_TCP_REQUEST_SNT_ISN) + 1;
	dial.client = key->client;
	dial.client_isn = key->client_isn;
	return dials.lookup(&dial) != NULL;
}

static __always_inline void tb_write_option(struct bpf_sock_ops *skops, const struct tb_pod *pod)
{
	struct tb_option option = {TB_OPTION_KIND, sizeof(option), {TB_OPTION_ID}};
	struct tb_half_key key = {};
	__u64 token;

	if (!tb_find_dial(skops, pod, &key))
		return;
	if (skops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB) {
		bpf_reserve_hdr_opt(skops, sizeof(option), 0);
		return;
	}
	token = tb_token(&key, pod->id);
	__builtin_memcpy(option.token, &token, sizeof(token));
	bpf_store_hdr_opt(skops, &option, sizeof(option), 0);
}

/* A client is established: keeps the token of the SYN-ACK that it has just got, if it has one. */
static __always_inline void tb_keep_token(struct bpf_sock_ops *skops)
{
	/* To search by kind and ID, the length is that of the two (bpf_helpers(7)). */
	struct tb_option option = {TB_OPTION_KIND, 4, {TB_OPTION_ID}};
	struct bpf_sock *sk = skops->sk;
	struct tb_dial dial = {};
	struct tb_conn *conn;

	if (!sk)
		return;
	TB_ADDR(skops, local, &dial.client);
	dial.client_isn = skops->snd_nxt;
	dials.delete(&dial);
	if (bpf_load_hdr_opt(skops, &option, sizeof(option), 0) != sizeof(option))
		return;
	conn = conns.sk_storage_get(sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (conn)
		__builtin_memcpy(&conn->token, option.token, sizeof(conn->token));
}

static __always_inline void tb_serve_services(struct bpf_sock_ops *skops, const struct tb_pod *pod)
{
	if (skops->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		tb_note_dial(skops);
	else if (skops->op == BPF_SOCK_OPS_TCP_LISTEN_CB) /* its connections inherit the flags */
		tb_call(skops, TB_CALL_PER_PACKET);
	else if (skops->op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		tb_call(skops, TB_CALL_NEVER);
	else if (skops->op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB)
		tb_keep_token(skops);
	else if (skops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB ||
		 skops->op == BPF_SOCK_OPS_WRITE_HDR_OPT_CB)
		tb_write_option(skops, pod);
}
