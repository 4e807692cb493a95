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
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#define MAX_SIZE (1 << 20)

static char buffer[MAX_SIZE];

static void serve(const struct endpoint *own, size_t size)
{
	int listener = listening(own);

	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		if (fd < 0)
			err(1, "accept");
		while (receive_all(fd, buffer, size) && send_all(fd, buffer, size))
			;
		close(fd);
	}
}

static void ask(const struct endpoint *own, const struct endpoint *server, size_t size,
		size_t warmup, size_t rounds)
{
	uint64_t *took = calloc(rounds, sizeof(*took));
	int fd = connected(own, server);

	if (!took)
		err(1, "calloc");
	for (size_t i = 0; i < warmup + rounds; i++) {
		uint64_t start = now_ns();

		if (!send_all(fd, buffer, size) || !receive_all(fd, buffer, size))
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
