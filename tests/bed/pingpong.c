// SPDX-License-Identifier: Apache-2.0
/*
 * A round trip over TCP, timed. In C because an interpreter between the system calls would add
 * the same microseconds to both sides of the comparison and so hide the difference.
 *
 *   pingpong serve ADDRESS PORT SIZE           echoes messages, one connection after the other;
 *                                              prints "ready" once it listens
 *   pingpong ask SOURCE ADDRESS PORT SIZE WARMUP ROUNDS
 *                                              sends from SOURCE, waits for the echo, and prints
 *                                              each round's nanoseconds on a line of its own
 */
#include <arpa/inet.h>
#include <err.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAX_SIZE (1 << 20)

static char buffer[MAX_SIZE];

static struct sockaddr_in address(const char *ip, const char *port)
{
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};

	if (inet_pton(AF_INET, ip, &in.sin_addr) != 1)
		errx(2, "%s is no IPv4 address", ip);
	return in;
}

static void set(int fd, int level, int option)
{
	int one = 1;

	if (setsockopt(fd, level, option, &one, sizeof(one)))
		err(1, "setsockopt");
}

/* Returns 0 at the end of the stream, else 1. */
static int receive(int fd, size_t size)
{
	for (size_t got = 0; got < size;) {
		ssize_t n = recv(fd, buffer + got, size - got, 0);

		if (n < 0)
			err(1, "recv");
		if (n == 0)
			return 0;
		got += n;
	}
	return 1;
}

static void transmit(int fd, size_t size)
{
	for (size_t sent = 0; sent < size;) {
		ssize_t n = send(fd, buffer + sent, size - sent, MSG_NOSIGNAL);

		if (n < 0)
			err(1, "send");
		sent += n;
	}
}

static void serve(const struct sockaddr_in *own, size_t size)
{
	int listener = socket(AF_INET, SOCK_STREAM, 0);

	set(listener, SOL_SOCKET, SO_REUSEADDR);
	if (bind(listener, (const struct sockaddr *)own, sizeof(*own)) || listen(listener, 16))
		err(1, "listen");
	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL);

		if (fd < 0)
			err(1, "accept");
		set(fd, IPPROTO_TCP, TCP_NODELAY);
		while (receive(fd, size))
			transmit(fd, size);
		close(fd);
	}
}

static uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * UINT64_C(1000000000) + t.tv_nsec;
}

static void ask(const struct sockaddr_in *own, const struct sockaddr_in *server, size_t size,
		size_t warmup, size_t rounds)
{
	uint64_t *took = calloc(rounds, sizeof(*took));
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	if (!took)
		err(1, "calloc");
	set(fd, IPPROTO_TCP, TCP_NODELAY);
	if (bind(fd, (const struct sockaddr *)own, sizeof(*own)))
		err(1, "bind");
	if (connect(fd, (const struct sockaddr *)server, sizeof(*server)))
		err(1, "connect");
	for (size_t i = 0; i < warmup + rounds; i++) {
		uint64_t start = now_ns();

		transmit(fd, size);
		if (!receive(fd, size))
			errx(1, "the server closed the connection");
		if (i >= warmup)
			took[i - warmup] = now_ns() - start;
	}
	close(fd);
	for (size_t i = 0; i < rounds; i++)
		printf("%llu\n", (unsigned long long)took[i]);
}

static size_t message_size(const char *text)
{
	size_t size = strtoul(text, NULL, 10);

	if (size < 1 || size > MAX_SIZE)
		errx(2, "a message has 1 to %d bytes, not %s", MAX_SIZE, text);
	return size;
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "serve")) {
		struct sockaddr_in own = address(argv[2], argv[3]);

		serve(&own, message_size(argv[4]));
	} else if (argc == 8 && !strcmp(argv[1], "ask")) {
		struct sockaddr_in own = address(argv[2], "0");
		struct sockaddr_in server = address(argv[3], argv[4]);

		ask(&own, &server, message_size(argv[5]), strtoul(argv[6], NULL, 10),
		    strtoul(argv[7], NULL, 10));
	} else {
		errx(2, "usage: pingpong serve ADDRESS PORT SIZE | "
			"ask SOURCE ADDRESS PORT SIZE WARMUP ROUNDS");
	}
	return 0;
}
