/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Two sockets find out that they are the ends of one connection. No socket joins a sockhash here.
 *
 * RULE (identity). Two sockets are one connection only if their initial sequence numbers mirror.
 * The kernel drew these two 32-bit numbers for this connection. Addresses do not decide. iptables
 * REDIRECT changes the server's, NAT the client's port, and client ports are reused at once.
 * 127.0.0.1:p -> 127.0.0.1:8080 is the same tuple in every pod. Nor do the numbers alone decide.
 * They are a hash of the tuple under one secret per boot, plus a clock (net/core/secure_seq.c). So
 * the same tuple draws the same numbers in two network namespaces at the same moment. Hence `netns`
 * in the key, and the rules on addresses in tb_client_established() and tb_half_fits().
 */

/* So old it is when it is first looked at, and may join. Most connections are shorter, and pay
 * little. */
#define TB_MIN_AGE (TB_MIN_AGE_MS * 1000000ULL)
/* So many exchanges an unpaired client is asked for its server. */
#define TB_SEEKING 16

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

/* Gives the socket of this callback, which lies at `sk`, a struct tb_conn with `me` filled in; or
 * returns NULL with the reason in *outcome. */
static __always_inline struct tb_conn *tb_remember(struct bpf_sock_ops *skops,
						   const struct tb_pod *pod, __u64 sk, int is_proxy,
						   __u32 *outcome)
{
	struct bpf_sock *socket = skops->sk;
	struct tb_conn *conn;
	__u64 id;

	*outcome = TB_OUTCOME_FULL;
	if (!socket)
		return NULL;
	conn = conns.sk_storage_get(socket, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!conn)
		return NULL;
	id = tb_new_id(skops, conn);
	if (!id)
		return NULL;
	__builtin_memset(conn, 0, sizeof(*conn));
	conn->last_id = id;
	conn->me.id = id;
	conn->me.sk = sk;
	conn->me.conn = (__u64)conn;
	conn->me.pod_id = pod->id;
	conn->me.is_proxy = is_proxy;
	conn->wanted = TB_MIN_EXCHANGES;
	conn->moved.received = skops->rcv_nxt;
	conn->moved.sent = skops->snd_nxt;
	conn->since = tb_tick_ns();
	tb_expect_passes(pod->id);
	tb_call_also(skops, TB_CALL_PER_ROUND_TRIP);
	return conn;
}

/*
 * A SYN has reached a listener of this pod, and the SYN-ACK is about to go out. Both initial
 * sequence numbers are known, so the connection is announced to its client, which is established
 * first. A client without an announcement has no peer on this node.
 */
static __always_inline void tb_announce(struct bpf_sock_ops *skops, const struct tb_pod *pod)
{
	struct tb_half_key key = {};
	struct tb_half half = {};
	__u64 request = tb_context_sock(skops);
	__u64 listener = tb_read64(request + OFF_REQUEST_SOCK_LISTENER);

	if (!listener || tb_pod_excludes(pod, skops->local_port))
		return;
	if ((pod->flags & TB_POD_PROXY_ONLY) && !tb_is_proxy(listener, pod))
		return;
	if (!tb_requested(skops, request, &key))
		return;
	key.netns = tb_key_netns(&key.client, request);
	half.server.pod_id = pod->id;
	half.server_netns = tb_netns_of(request);
	halves.insert(&key, &half);
}

/* The client's end is established, before the server's. Claims the connection if it was announced.
 * Returns an enum tb_outcome, TB_OUTCOME_NONE while the server has not claimed it as well. */
static __always_inline __u32 tb_client_established(struct bpf_sock_ops *skops,
						   const struct tb_pod *pod)
{
	__u64 sk = tb_context_sock(skops);
	struct tb_half_key key = {};
	struct tb_half half = {}, *found;
	struct tb_dial dial = {};
	struct tb_conn *conn;
	int is_proxy = tb_is_proxy(sk, pod);
	__u32 outcome;

	if (!TB_ADDR(skops, local, &key.client) || !TB_ADDR(skops, remote, &half.dialled))
		return TB_OUTCOME_NO_PEER;
	key.netns = tb_key_netns(&key.client, sk);
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
				 found->server_netns != tb_netns_of(sk)))
		return TB_OUTCOME_MISMATCH;
	half.server.pod_id = found->server.pod_id;
	half.server_netns = found->server_netns;
	half.has_token = (pod->flags & TB_POD_SERVICES) && tb_has_token(skops, &key, found);
	half.dialled_port = bpf_ntohl(skops->remote_port);
	if (tb_pod_excludes(pod, half.dialled_port) || tb_pod_excludes(pod, skops->local_port) ||
	    ((pod->flags & TB_POD_PROXY_ONLY) && !is_proxy))
		return TB_OUTCOME_EXCLUDED;
	conn = tb_remember(skops, pod, sk, is_proxy, &outcome);
	if (!conn)
		return outcome;
	conn->me.is_client = 1;
	conn->half = key;
	half.client = conn->me;
	halves.update(&key, &half);
	return TB_OUTCOME_NONE;
}

/* Whether a connection may be this pod's server's. RULE (identity): a half is taken once. From
 * another pod only the owner of the dialled address takes it, or the pod of the client's token. */
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
		(half->has_token && half->server.pod_id == pod->id));
}

/* The server's end is established: it is paired if its client has claimed the connection. */
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
	key.netns = tb_key_netns(&key.client, sk);
	key.client_isn = skops->rcv_nxt;
	key.server_isn = skops->snd_nxt;
	found = halves.lookup(&key);
	if (!found)
		return TB_OUTCOME_NO_PEER;
	half = *found;
	if (!half.client.id) {
		halves.delete(&key); /* its client is on another node, or not accelerated */
		return TB_OUTCOME_NO_PEER;
	}
	if (!tb_half_fits(&half, &key, pod, &local, tb_netns_of(sk)))
		return TB_OUTCOME_MISMATCH;
	if (tb_pod_excludes(pod, skops->local_port) || tb_pod_excludes(pod, half.dialled_port) ||
	    tb_pod_excludes(pod, bpf_ntohl(skops->remote_port)))
		return TB_OUTCOME_EXCLUDED;
	conn = tb_remember(skops, pod, sk, tb_is_proxy(sk, pod), &outcome);
	if (!conn)
		return outcome;
	conn->half = key;
	conn->peer = half.client;
	*hop = conn->hop = tb_hop(&half.client, &conn->me);
	half.server = conn->me;
	halves.update(&key, &half);
	return TB_OUTCOME_PAIRED;
}

static __always_inline int tb_is_paired(const struct tb_conn *conn)
{
	return conn->peer.id != 0;
}

/* A client that is not paired asks for the server that has claimed its connection. The map may have
 * dropped the entry, or have it for another connection by now: then this one stays on TCP. A visit
 * and a callback may both ask at once. The one that takes the entry away counts. */
static __always_inline void tb_seek(struct tb_conn *conn)
{
	struct tb_half *half;
	struct tb_end server;

	if (tb_is_paired(conn))
		return;
	half = halves.lookup(&conn->half);
	if (!half)
		return;
	server = half->server; /* before the look at the client: the map may use the entry again */
	if (half->client.id != conn->me.id || !server.id)
		return;
	conn->peer = server;
	conn->hop = tb_hop(&conn->me, &conn->peer);
	if (!halves.delete(&conn->half))
		tb_count_outcome(conn->me.pod_id, conn->hop, TB_OUTCOME_PAIRED);
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
	       tb_file(conn->peer.sk);
}

/* Are these two still the sockets that were paired? The numbers are computed anew from what TCP has
 * counted since. An active opener counts its SYN. */
static __always_inline int tb_is_same_connection(const struct tb_conn *conn, __u64 sk)
{
	__u32 own = tb_read32(sk + OFF_TCP_SOCK_SND_UNA) - tb_read32(sk + OFF_TCP_SOCK_BYTES_ACKED);
	__u32 peers =
		tb_read32(sk + OFF_TCP_SOCK_RCV_NXT) - tb_read32(sk + OFF_TCP_SOCK_BYTES_RECEIVED);

	if (conn->half.netns && conn->half.netns != tb_netns_of(sk))
		return 0;
	if (conn->me.is_client)
		return own + 1 == conn->half.client_isn && peers == conn->half.server_isn;
	return own == conn->half.server_isn && peers == conn->half.client_isn;
}
