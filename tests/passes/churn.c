// SPDX-License-Identifier: Apache-2.0
/*
 * churn THREADS SECONDS [mptcp | ktls]: connections over loopback, v4, v6 and v4 in v6, that end in
 * every way there is, also under another thread's hands. What is sent may get lost; no byte is
 * checked. Prints counts as JSON. "mptcp": the listeners are MPTCP; the clients are TCP. "ktls":
 * each sets kTLS after one exchange, about when it joins, and closes.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/tls.h>

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif
#ifndef SOL_TLS
#define SOL_TLS 282
#endif
#define MAX_THREADS 64
#define SHARED 64
#define FAMILIES 3 /* the third is v4 in v6 */

enum counted { CONNECTED, FAILED, REUSED, FORKED, PASSED, KTLS, KTLS_UNDONE, ADDRFORM, COUNTS };
static const char *const names[COUNTS] = {"connections", "failures", "reused",	    "forked",
					  "passed on",	 "ktls",     "ktls undone", "addrform"};
static atomic_long counts[COUNTS];
static atomic_int shared[SHARED]; /* sockets that any thread may use */
static time_t deadline;
static int is_mptcp, is_ktls;

struct worker {
	pthread_t thread;
	unsigned seed;
	int listener[FAMILIES];
	struct sockaddr_in6 address[FAMILIES];
};

static void must(int result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
}

static int listen_on(int family, struct sockaddr_in6 *address)
{
	int fd = socket(family ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_NONBLOCK,
			is_mptcp ? IPPROTO_MPTCP : 0);
	socklen_t length = sizeof(*address);
	int one = 1;

	must(fd, "socket");
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); /* else none joins */
	memset(address, 0, sizeof(*address));
	address->sin6_family = AF_INET6;
	if (!family) {
		*(struct sockaddr_in *)address = (struct sockaddr_in){
			.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
		length = sizeof(struct sockaddr_in);
	} else if (family == 1) {
		address->sin6_addr = in6addr_loopback;
	} else {
		inet_pton(AF_INET6, "::ffff:127.0.0.1", &address->sin6_addr);
	}
	must(bind(fd, (struct sockaddr *)address, length), "bind");
	must(listen(fd, 64), "listen");
	must(getsockname(fd, (struct sockaddr *)address, &length), "getsockname");
	return fd;
}

static void disconnect(int fd)
{
	struct sockaddr none = {.sa_family = AF_UNSPEC};

	connect(fd, &none, sizeof(none));
}

static void reset(int fd)
{
	struct linger linger = {1, 0};

	setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof(linger));
	close(fd);
}

static int accept_from(int listener)
{
	struct pollfd ready = {listener, POLLIN, 0};

	if (poll(&ready, 1, 1000) != 1)
		return -1;
	return accept4(listener, NULL, NULL, SOCK_NONBLOCK);
}

static void rest(unsigned *seed, int at_most_us)
{
	struct timespec end, now;
	long ns = rand_r(seed) % at_most_us * 1000L;

	clock_gettime(CLOCK_MONOTONIC, &end);
	do
		clock_gettime(CLOCK_MONOTONIC, &now);
	while ((now.tv_sec - end.tv_sec) * 1000000000L + now.tv_nsec - end.tv_nsec < ns);
}

/* A few messages each way, as far as they come. */
static void talk(int a, int b, unsigned *seed)
{
	char buffer[20000] = {0};

	for (int left = 1 + rand_r(seed) % 8; left; left--) {
		send(a, buffer, 1 + rand_r(seed) % sizeof(buffer), MSG_NOSIGNAL);
		if (rand_r(seed) % 4)
			recv(b, buffer, sizeof(buffer), 0);
		send(b, buffer, 1 + rand_r(seed) % 100, MSG_NOSIGNAL);
		if (rand_r(seed) % 4)
			recv(a, buffer, sizeof(buffer), 0);
		if (!(rand_r(seed) % 4))
			usleep(rand_r(seed) % 1000);
	}
}

static void exchange(int a, int b)
{
	char byte = 0;

	send(a, &byte, 1, MSG_NOSIGNAL);
	recv(b, &byte, 1, 0);
	send(b, &byte, 1, MSG_NOSIGNAL);
	recv(a, &byte, 1, 0);
}

/* What another thread does to a socket in use. By now it may be any connection's. */
static void interfere(unsigned *seed)
{
	int fd = shared[rand_r(seed) % SHARED];
	char byte = 0;

	if (fd <= 0)
		return;
	switch (rand_r(seed) % 4) {
	case 0:
		disconnect(fd);
		break;
	case 1:
		shutdown(fd, SHUT_RDWR);
		break;
	case 2:
		send(fd, &byte, 1, MSG_NOSIGNAL);
		break;
	default:
		recv(fd, &byte, 1, 0);
	}
}

/* kTLS about when a pass takes the socket in: what is set must stay set. */
static void set_ktls(int fd, unsigned *seed)
{
	struct tls12_crypto_info_aes_gcm_128 keys = {
		.info = {TLS_1_2_VERSION, TLS_CIPHER_AES_GCM_128}};

	rest(seed, 300);
	if (setsockopt(fd, IPPROTO_TCP, TCP_ULP, "tls", 3))
		return;
	counts[KTLS]++;
	rest(seed, 300);
	if (setsockopt(fd, SOL_TLS, TLS_TX, &keys, sizeof(keys)))
		counts[KTLS_UNDONE]++;
}

static void fork_once(unsigned *seed)
{
	int pid = fork();

	if (!pid) {
		usleep(rand_r(seed) % 2000);
		_exit(0);
	}
	if (pid > 0)
		waitpid(pid, NULL, 0);
	counts[FORKED]++;
}

/* The socket goes through SCM_RIGHTS and comes back under another number. */
static int pass_on(int fd)
{
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = {0};
	struct iovec data = {&byte, 1};
	struct msghdr message = {.msg_iov = &data,
				 .msg_iovlen = 1,
				 .msg_control = control,
				 .msg_controllen = sizeof(control)};
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
	int ends[2];

	must(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), "socketpair");
	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(rights), &fd, sizeof(fd));
	if (sendmsg(ends[0], &message, 0) == 1) {
		close(fd);
		must(recvmsg(ends[1], &message, 0), "recvmsg");
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
		counts[PASSED]++;
	}
	close(ends[0]);
	close(ends[1]);
	return fd;
}

static void finish(int client, int server, unsigned *seed)
{
	char buffer[20000];

	switch (rand_r(seed) % 6) {
	case 0:
		close(client);
		close(server);
		return;
	case 1:
		close(server);
		close(client);
		return;
	case 2:
		reset(client);
		close(server);
		return;
	case 3:
		reset(server);
		send(client, buffer, 1, MSG_NOSIGNAL);
		close(client);
		return;
	case 4:
		shutdown(client, SHUT_WR);
		talk(server, client, seed);
		close(server);
		recv(client, buffer, sizeof(buffer), 0);
		close(client);
		return;
	default:
		shutdown(server, SHUT_RDWR);
		reset(client);
		reset(server);
	}
}

static void connect_once(struct worker *self)
{
	unsigned *seed = &self->seed;
	int which = rand_r(seed) % FAMILIES, v4 = AF_INET;
	struct sockaddr *address = (struct sockaddr *)&self->address[which];
	int client = socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
	int server, one = 1;

	must(client, "socket");
	setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	connect(client, address, sizeof(self->address[which]));
	server = accept_from(self->listener[which]);
	if (server < 0) {
		counts[FAILED]++;
		close(client);
		return;
	}
	counts[CONNECTED]++;
	shared[rand_r(seed) % SHARED] = client;
	shared[rand_r(seed) % SHARED] = server;
	if (is_ktls)
		exchange(client, server);
	else
		talk(client, server, seed);
	switch (is_ktls ? 0 : rand_r(seed) % 16) {
	case 0 ... 3:
		set_ktls(rand_r(seed) % 2 ? client : server, seed);
		break;
	case 4 ... 7: /* the same socket once more */
		disconnect(client);
		connect(client, address, sizeof(self->address[which]));
		close(server);
		server = accept_from(self->listener[which]);
		counts[REUSED]++;
		talk(client, server, seed);
		break;
	case 8:
		fork_once(seed);
		break;
	case 9 ... 10:
		client = pass_on(client);
		talk(server, client, seed);
		break;
	case 11 ... 13:
		rest(seed, 300);
		if (which == 2 && !setsockopt(client, IPPROTO_IPV6, IPV6_ADDRFORM, &v4, sizeof(v4)))
			counts[ADDRFORM]++;
		talk(client, server, seed);
	}
	if (!is_ktls && !(rand_r(seed) % 4))
		interfere(seed);
	finish(client, server, seed);
}

static void *run(void *argument)
{
	while (time(NULL) < deadline)
		connect_once(argument);
	return NULL;
}

int main(int count, char **arguments)
{
	static struct worker workers[MAX_THREADS];
	int wanted = count > 2 ? atoi(arguments[1]) : 0;

	if (wanted < 1 || wanted > MAX_THREADS)
		return 2;
	deadline = time(NULL) + atoi(arguments[2]);
	is_ktls = count > 3 && !strcmp(arguments[3], "ktls");
	is_mptcp = count > 3 && !strcmp(arguments[3], "mptcp");
	for (int i = 0; i < wanted; i++) { /* first, so that no thread gets at these */
		workers[i].seed = i + 1;
		for (int family = 0; family < FAMILIES; family++)
			workers[i].listener[family] =
				listen_on(family, &workers[i].address[family]);
	}
	for (int i = 0; i < wanted; i++)
		must(-pthread_create(&workers[i].thread, NULL, run, &workers[i]), "pthread_create");
	for (int i = 0; i < wanted; i++)
		pthread_join(workers[i].thread, NULL);
	printf("{\"threads\": %d", wanted);
	for (int i = 0; i < COUNTS; i++)
		printf(", \"%s\": %ld", names[i], counts[i]);
	puts("}");
	return 0;
}
