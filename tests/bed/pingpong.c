// SPDX-License-Identifier: Apache-2.0
/*
 * A round trip, timed. In C because an interpreter between the system calls would add the same
 * microseconds to both sides of the comparison and so hide the difference.
 *
 *   pingpong serve ADDRESS PORT SIZE READER    echoes messages, one connection after the other;
 *                                              prints "ready" once it listens
 *   pingpong ask SOURCE ADDRESS PORT SIZE READER WARMUP_MS JOIN_MS ROUNDS
 *                                              sends from SOURCE, waits for the echo, and prints
 *                                              how many rounds the warm-up took and after how many
 *                                              nanoseconds the connection bypassed (0: it did
 *                                              not); then each round's nanoseconds on a line
 *
 * READER is "events", which asks epoll before each recv, or "blocking", which sleeps in recv. The
 * warm-up lasts WARMUP_MS, and then until the connection bypasses, JOIN_MS at most.
 */
#define _GNU_SOURCE
#include "endpoint.h"
#include <inttypes.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <unistd.h>

#define MAX_SIZE (1 << 20)
#define NS_PER_MS UINT64_C(1000000)
/* Of struct tcp_info (linux/tcp.h, which cannot be had beside netinet/tcp.h), in words. */
#define TCPI_BYTES_RECEIVED 16
#define TCPI_BYTES_SENT 25
#define TCPI_WORDS 26

static char buffer[MAX_SIZE];

/* An event loop of one connection; -1 for a reader that sleeps in recv. */
static int watched(int fd, int blocking)
{
	struct epoll_event readable = {.events = EPOLLIN};
	int loop;

	if (blocking)
		return -1;
	make_nonblocking(fd);
	loop = epoll_create1(0);
	if (loop < 0 || epoll_ctl(loop, EPOLL_CTL_ADD, fd, &readable))
		err(1, "epoll");
	return loop;
}

/* Receives exactly size bytes. Returns 0 at the end of the stream, else 1. */
static int receive(int loop, int fd, char *bytes, size_t size)
{
	for (size_t got = 0; got < size;) {
		struct epoll_event event;
		ssize_t n;

		if (loop >= 0 && epoll_wait(loop, &event, 1, -1) < 0)
			err(1, "epoll_wait");
		n = recv(fd, bytes + got, size - got, 0);
		if (n == 0)
			return 0;
		if (n > 0)
			got += n;
		else if (errno != EAGAIN)
			err(1, "recv");
	}
	return 1;
}

static void serve(const struct endpoint *own, size_t size, int blocking)
{
	int listener = listening(own);

	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL), loop;

		if (fd < 0)
			err(1, "accept");
		loop = watched(fd, blocking);
		while (receive(loop, fd, buffer, size) && send_all(fd, buffer, size))
			;
		if (loop >= 0)
			close(loop);
		close(fd);
	}
}

static void exchange(int loop, int fd, size_t size)
{
	if (!send_all(fd, buffer, size) || !receive(loop, fd, buffer, size))
		errx(1, "the server closed the connection");
}

/* Have bytes gone both ways since the last call, and none of them by TCP? Its counters stand still
 * then. */
static int has_bypassed(int fd, uint64_t *received, uint64_t *sent)
{
	uint64_t info[TCPI_WORDS] = {0}, in = *received, out = *sent;
	socklen_t size = sizeof(info);

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &size) || size < sizeof(info))
		return 0; /* AF_UNIX */
	*received = info[TCPI_BYTES_RECEIVED];
	*sent = info[TCPI_BYTES_SENT];
	return *received == in && *sent == out;
}

static void ask(const struct endpoint *own, const struct endpoint *server, size_t size,
		int blocking, uint64_t warmup_ms, uint64_t join_ms, size_t rounds)
{
	uint64_t *took = calloc(rounds, sizeof(*took)), start = now_ns(), joined = 0, passed;
	uint64_t received = 0, sent = 0, warmup = 0;
	int fd = connected(own, server), loop = watched(fd, blocking);

	if (!took)
		err(1, "calloc");
	while ((passed = now_ns() - start) < warmup_ms * NS_PER_MS ||
	       (!joined && passed < join_ms * NS_PER_MS)) {
		exchange(loop, fd, size);
		warmup++;
		if (!joined && has_bypassed(fd, &received, &sent))
			joined = now_ns() - start;
	}
	for (size_t i = 0; i < rounds; i++) {
		start = now_ns();
		exchange(loop, fd, size);
		took[i] = now_ns() - start;
	}
	close(fd);
	printf("%" PRIu64 " %" PRIu64 "\n", warmup, joined);
	for (size_t i = 0; i < rounds; i++)
		printf("%" PRIu64 "\n", took[i]);
}

static size_t message_size(const char *text)
{
	size_t size = number(text);

	if (size < 1 || size > MAX_SIZE)
		errx(2, "a message has 1 to %d bytes, not %s", MAX_SIZE, text);
	return size;
}

static int is_blocking(const char *reader)
{
	int blocking = !strcmp(reader, "blocking");

	if (!blocking && strcmp(reader, "events"))
		errx(2, "a reader is \"events\" or \"blocking\", not %s", reader);
	return blocking;
}

int main(int argc, char **argv)
{
	if (argc == 6 && !strcmp(argv[1], "serve")) {
		struct endpoint own = endpoint(argv[2], number(argv[3]));

		serve(&own, message_size(argv[4]), is_blocking(argv[5]));
	} else if (argc == 10 && !strcmp(argv[1], "ask")) {
		struct endpoint own = endpoint(argv[2], 0);
		struct endpoint server = endpoint(argv[3], number(argv[4]));

		ask(&own, &server, message_size(argv[5]), is_blocking(argv[6]), number(argv[7]),
		    number(argv[8]), number(argv[9]));
	} else {
		errx(2, "usage: pingpong serve ADDRESS PORT SIZE READER | "
			"ask SOURCE ADDRESS PORT SIZE READER WARMUP_MS JOIN_MS ROUNDS");
	}
	return 0;
}
