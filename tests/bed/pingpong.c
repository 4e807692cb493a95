// SPDX-License-Identifier: Apache-2.0
/*
 * A round trip, timed. In C because an interpreter between the system calls would add the same
 * microseconds to both sides of the comparison and so hide the difference.
 *
 *   pingpong serve ADDRESS PORT SIZE           echoes messages, one connection after the other;
 *                                              prints "ready" once it listens
 *   pingpong ask SOURCE ADDRESS PORT SIZE WARMUP ROUNDS
 *                                              sends from SOURCE, waits for the echo, and prints
 *                                              each round's nanoseconds on a line of its own
 */
#define _GNU_SOURCE
#include "endpoint.h"
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <unistd.h>

#define MAX_SIZE (1 << 20)

static char buffer[MAX_SIZE];

/* An event loop of one connection, which asks epoll before each recv. */
static int watched(int fd)
{
	struct epoll_event readable = {.events = EPOLLIN};
	int loop = epoll_create1(0);

	if (fcntl(fd, F_SETFL, O_NONBLOCK) || loop < 0 ||
	    epoll_ctl(loop, EPOLL_CTL_ADD, fd, &readable))
		err(1, "epoll");
	return loop;
}

/* Receives exactly size bytes. Returns 0 at the end of the stream, else 1. */
static int receive(int loop, int fd, char *bytes, size_t size)
{
	for (size_t got = 0; got < size;) {
		struct epoll_event event;
		ssize_t n;

		if (epoll_wait(loop, &event, 1, -1) < 0)
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

static void serve(const struct endpoint *own, size_t size)
{
	int listener = listening(own);

	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL), loop;

		if (fd < 0)
			err(1, "accept");
		loop = watched(fd);
		while (receive(loop, fd, buffer, size) && send_all(fd, buffer, size))
			;
		close(loop);
		close(fd);
	}
}

static void ask(const struct endpoint *own, const struct endpoint *server, size_t size,
		size_t warmup, size_t rounds)
{
	uint64_t *took = calloc(rounds, sizeof(*took));
	int fd = connected(own, server), loop = watched(fd);

	if (!took)
		err(1, "calloc");
	for (size_t i = 0; i < warmup + rounds; i++) {
		uint64_t start = now_ns();

		if (!send_all(fd, buffer, size) || !receive(loop, fd, buffer, size))
			errx(1, "the server closed the connection");
		if (i >= warmup)
			took[i - warmup] = now_ns() - start;
	}
	close(fd);
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

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "serve")) {
		struct endpoint own = endpoint(argv[2], number(argv[3]));

		serve(&own, message_size(argv[4]));
	} else if (argc == 8 && !strcmp(argv[1], "ask")) {
		struct endpoint own = endpoint(argv[2], 0);
		struct endpoint server = endpoint(argv[3], number(argv[4]));

		ask(&own, &server, message_size(argv[5]), number(argv[6]), number(argv[7]));
	} else {
		errx(2, "usage: pingpong serve ADDRESS PORT SIZE | "
			"ask SOURCE ADDRESS PORT SIZE WARMUP ROUNDS");
	}
	return 0;
}
