/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Two sockets find out that they are the ends of one connection. No socket joins a sockhash here.
 *
 * RULE (identity). Two sockets are one connection only if their initial sequence numbers mirror.
 * The kernel drew these two 32-bit numbers for this connection. They are computed from what TCP has
 * counted since. Addresses do not decide. iptables REDIRECT changes the server's, NAT the client's
 * port, and client ports are reused at once. 127.0.0.1:p -> 127.0.0.1:8080 is the same tuple in
 * every pod. Nor do the numbers alone decide. They are a hash of the tuple under one secret per
 * boot, plus a clock (net/core/secure_seq.c). So the same tuple draws the same numbers in two
 * network namespaces at the same moment. Hence `netns` in the key, and the rules on addresses in
 * tb_enter() and tb_half_fits().
 */

/* With fewer segments received (TB_MIN_SEGMENTS) a connection is left alone. Then it makes
 * TB_FIRST_WANTED exchanges until each of its packets is looked at. It does not join earlier than
 * TB_MIN_AGE after its first look, or after it left. Most connections are shorter, and pay little.
 */
#define TB_MIN_AGE (TB_MIN_AGE_MS * 1000000ULL)
/* An end looks for its peer, which may receive fewer segments in each, during so many exchanges
 * more than it wants. One that was taken in looks for TB_SEEKING_NS at least (tb_take_in()). */
#define TB_SEEKING (TB_MIN_SEGMENTS + 16)
#define TB_SEEKING_NS (3 * NS_PER_S)

/*
 * The id of this connection's end. Not the socket's cookie alone: a socket that disconnects
 * (AF_UNSPEC) and connects again keeps it, and an old peer that never heard of that would reach the
 * new connection. 0 when this socket has used up its ids.
 */
static __always_inline __u64 tb_new_id(struct bpf_sock_ops *skops, const struct tb_conn *conn)
{
	__u64 first = tb_socket_cookie(skops) << TB_ID_SHIFT;
	__u64 next = conn->last_id + 1;

	if (!conn->last_id)
		return first;
	return next >> TB_ID_SHIFT == first >> TB_ID_SHIFT ? next : 0;
}

static __always_inline struct tb_conn *tb_conn_of(struct bpf_sock_ops *skops)
{
	struct bpf_sock *sk = skops->sk;

	return sk ? conns.sk_storage_get(sk, 0, 0) : NULL;
}

/* Fills in the connection's numbers. An active opener has counted its SYN. */
static __always_inline void tb_number(struct tb_half_key *key, __u64 sk, int is_client)
{
	__u32 own = tb_read32(sk + OFF_TCP_SOCK_SND_UNA) - tb_read32(sk + OFF_TCP_SOCK_BYTES_ACKED);
	__u32 peers =
		tb_read32(sk + OFF_TCP_SOCK_RCV_NXT) - tb_read32(sk + OFF_TCP_SOCK_BYTES_RECEIVED);

	key->client_isn = is_client ? own + 1 : peers;
	key->server_isn = is_client ? peers : own;
}

/* Gives the socket of this callback, which lies at `sk`, a struct tb_conn with `me` and `half`
 * filled in, but for `half.netns`. Returns NULL if memory is short. */
static __always_inline struct tb_conn *tb_remember(struct bpf_sock_ops *skops,
						   const struct tb_pod *pod, __u64 sk)
{
	int is_client = (skops->bpf_sock_ops_cb_flags & TB_CLIENT) != 0;
	struct tb_due first = {.cost = TB_FIRST_COST};
	struct bpf_sock *socket = skops->sk;
	__u64 id, token, pod_id = pod->id;
	struct tb_conn *conn;

	if (!socket)
		return NULL;
	conn = conns.sk_storage_get(socket, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!conn)
		return NULL;
	id = tb_new_id(skops, conn);
	if (!id)
		return NULL;
	token = conn->token;
	__builtin_memset(conn, 0, sizeof(*conn));
	conn->token = token;
	conn->last_id = id;
	conn->me.id = id;
	conn->me.sk = sk;
	conn->me.conn = (__u64)conn;
	conn->me.pod_id = pod_id;
	conn->me.is_proxy = tb_is_proxy(sk, pod);
	conn->me.is_client = is_client;
	tb_number(&conn->half, sk, is_client);
	conn->wanted = TB_FIRST_WANTED;
	conn->moved.received = skops->rcv_nxt;
	conn->moved.sent = skops->snd_nxt;
	conn->since = tb_tick_ns();
	due.insert(&pod_id, &first); /* for the pod's first connection */
	return conn;
}

/* A client enters its connection for its server. `netns` says in which namespace the server must
 * be, unless the client's pod owns the address: a sidecar may speak in the name of a client
 * elsewhere (TPROXY), to its own namespace. Returns 0, or an enum tb_outcome. */
static __always_inline __u32 tb_enter(struct bpf_sock_ops *skops, const struct tb_pod *pod,
				      struct tb_conn *conn)
{
	struct tb_half half = {};

	TB_ADDR(skops, local, &conn->half.client);
	TB_ADDR(skops, remote, &half.dialled);
	half.client = conn->me;
	half.client_netns = tb_netns_of(conn->me.sk);
	half.token = conn->token;
	half.dialled_port = tb_remote_port(skops);
	if (!tb_pod_owns(pod, &conn->half.client) || !tb_is_in_netns_of(pod, conn->me.sk))
		conn->half.netns = half.client_netns;
	return halves.insert(&conn->half, &half) ? TB_OUTCOME_MISMATCH : TB_OUTCOME_NONE;
}

/* Does the connection that a client has entered fit this server, a socket of `pod`? RULE
 * (identity): a server takes it once. From another pod only the owner of the dialled address takes
 * it, or the pod of the client's token. */
static __always_inline int tb_half_fits(const struct tb_half *half, const struct tb_conn *conn,
					const struct tb_pod *pod, const struct tb_addr *local)
{
	if (half->server.id)
		return 0;
	if (half->client.pod_id == pod->id)
		return half->client_netns == tb_netns_of(conn->me.sk);
	return !conn->half.netns && tb_pod_owns(pod, local) &&
	       tb_is_in_netns_of(pod, conn->me.sk) &&
	       (tb_pod_owns(pod, &half->dialled) ||
		(half->token && half->token == tb_token(&conn->half, pod->id)));
}

/* A server looks for the connection that its client has entered, and is paired if it fits. */
static __always_inline void tb_find_client(struct bpf_sock_ops *skops, const struct tb_pod *pod,
					   struct tb_conn *conn)
{
	struct tb_half half, *found;
	struct tb_addr local = {};

	TB_ADDR(skops, remote, &conn->half.client);
	TB_ADDR(skops, local, &local);
	conn->half.netns = tb_netns_of(conn->me.sk);
	found = halves.lookup(&conn->half);
	if (!found && !tb_addr_is_local(&conn->half.client)) {
		conn->half.netns = 0;
		found = halves.lookup(&conn->half);
	}
	if (!found)
		return;
	half = *found;
	if (!tb_half_fits(&half, conn, pod, &local))
		return tb_refuse(conn, TB_OUTCOME_MISMATCH);
	if (tb_pod_excludes(pod, half.dialled_port))
		return tb_refuse(conn, TB_OUTCOME_EXCLUDED);
	half.server = conn->me;
	halves.update(&conn->half, &half);
	conn->peer = half.client;
	tb_count_outcome(pod->id, tb_hop(conn), TB_OUTCOME_PAIRED);
}

/* A connection is no longer young: its socket is remembered, or calls no more. */
static __always_inline struct tb_conn *tb_meet(struct bpf_sock_ops *skops, const struct tb_pod *pod)
{
	__u64 sk = tb_context_sock(skops);
	__u32 outcome = TB_OUTCOME_FULL;
	struct tb_conn *conn = NULL;

	if (tb_pod_excludes(pod, skops->local_port) ||
	    tb_pod_excludes(pod, tb_remote_port(skops)) ||
	    ((pod->flags & TB_POD_PROXY_ONLY) && !tb_is_proxy(sk, pod)))
		outcome = TB_OUTCOME_EXCLUDED;
	else
		conn = tb_remember(skops, pod, sk);
	if (!conn) {
		tb_count_outcome(pod->id, TB_HOP_NONE, outcome);
		tb_call(skops, TB_CALL_NEVER);
		return NULL;
	}
	outcome = conn->me.is_client ? tb_enter(skops, pod, conn) : 0;
	if (outcome)
		tb_refuse(conn, outcome);
	return conn;
}

static __always_inline int tb_is_paired(const struct tb_conn *conn)
{
	return conn->peer.id != 0;
}

/* A client that is not paired asks for the server that has found its connection. The map may have
 * dropped the entry, or have it for another connection by now: then this one stays on TCP. */
static __always_inline void tb_seek(struct tb_conn *conn)
{
	struct tb_half *half;
	struct tb_end server;

	if (tb_is_paired(conn) || !conn->me.is_client)
		return;
	half = halves.lookup(&conn->half);
	if (!half)
		return;
	server = half->server; /* before the look at the client: the map may use the entry again */
	if (half->client.id != conn->me.id || !server.id)
		return;
	conn->peer = server;
	halves.delete(&conn->half);
	tb_count_outcome(conn->me.pod_id, tb_hop(conn), TB_OUTCOME_PAIRED);
}

/* Is the peer's struct tb_conn still that of the peer? RULE (identity): the ends name each other.
 */
static __always_inline int tb_has_peer(const struct tb_conn *conn)
{
	return TB_PEERS(__u64, conn, me.id) == conn->peer.id &&
	       TB_PEERS(__u64, conn, peer.id) == conn->me.id;
}

/* Has the peer a bypass queue, and threads that may redirect? Not once it has closed, or left. */
static __always_inline int tb_is_peer_in(const struct tb_conn *conn)
{
	return tb_has_peer(conn) && tb_membership(TB_PEERS(__u32, conn, state)) != TB_OUT &&
	       tb_file(conn->peer.sk) && tb_psock(conn->peer.sk) == TB_PEERS(__u64, conn, at.psock);
}

/* Are these two still the sockets that were paired? */
static __always_inline int tb_is_same_connection(const struct tb_conn *conn, __u64 sk)
{
	struct tb_half_key now = {};

	if (conn->half.netns && conn->half.netns != tb_netns_of(sk))
		return 0;
	tb_number(&now, sk, conn->me.is_client);
	return now.client_isn == conn->half.client_isn && now.server_isn == conn->half.server_isn;
}
