// SPDX-License-Identifier: Apache-2.0
/*
 * A stream over one connection: how many bytes per second arrive, and what they cost both ends.
 *
 *   stream serve ADDRESS PORT        prints "ready", then a line per connection, one after the
 *                                    other: the reader's end (or one end of a duplex stream)
 *   stream drive SOURCE ADDRESS PORT SIZE HOW SERVER_CPU TALK_MS WARMUP_MS MEASURE_MS
 *                                    writes SIZE bytes at a time; prints the same line for its end
 *
 * A line: nanoseconds measured, bytes received in them, CPU nanoseconds used in them. Both ends are
 * event loops, as Envoy, nginx and Go have them. HOW is 0: one way, to a reader with edge-triggered
 * epoll; 1: duplex, both ends read and write, as a proxy does. First the ends ask and answer for
 * TALK_MS, in which the connection joins. The server moves to SERVER_CPU first.
 */
#define _GNU_SOURCE
#include "endpoint.h"
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <unistd.h>

#define MAX_WRITE (1 << 20)
#define READ_SIZE (1 << 18)
#define CLOCK_EVERY 16 /* small messages, so that the clock is not what is measured */
#define LARGE 16384
#define QUESTION 64

enum how { ONE_WAY, DUPLEX };

static char out[MAX_WRITE], in[READ_SIZE];

/* What the driver tells the server in the connection's first bytes. */
struct plan {
	uint64_t size, how, server_cpu, talk_ns, warmup_ns, measure_ns;
};

/* The time of one end, and what it has seen between the end of its warm-up and the end. */
struct window {
	uint64_t begin, end, cpu, received;
	int open, over;
};

static struct window window_of(const struct plan *plan)
{
	uint64_t begin = now_ns() + plan->warmup_ns;

	return (struct window){.begin = begin, .end = begin + plan->measure_ns};
}

static void finish(struct window *window, uint64_t now)
{
	window->over = 1;
	printf("%" PRIu64 " %" PRIu64 " %" PRIu64 "\n", now - window->begin, window->received,
	       cpu_ns() - window->cpu);
	fflush(stdout);
}

static void look_at_the_clock(struct window *window)
{
	uint64_t now = now_ns();

	if (!window->open && now >= window->begin) {
		window->open = 1;
		window->begin = now;
		window->cpu = cpu_ns();
		window->received = 0;
	} else if (window->open && !window->over && now >= window->end) {
		finish(window, now);
	}
}

/* The server ends the stream. It began after the driver, which has mostly finished, too. */
static void peer_has_gone(struct window *window)
{
	if (!window->open)
		errx(1, "the stream has ended before its measurement");
	if (!window->over)
		finish(window, now_ns());
}

static void took(struct window *window, size_t bytes)
{
	if (!window->over)
		window->received += bytes;
	look_at_the_clock(window);
}

static void write_only(int fd, const struct plan *plan)
{
	struct window window = window_of(plan);

	for (uint64_t i = 0; send_all(fd, out, plan->size); i++)
		if (plan->size >= LARGE || i % CLOCK_EVERY == 0)
			look_at_the_clock(&window);
	peer_has_gone(&window);
}

/* A descriptor to wait on for new bytes. */
static int edges_of(int fd)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLET};
	int poller = epoll_create1(0);

	if (poller < 0 || epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event))
		err(1, "epoll");
	return poller;
}

static void read_only(int fd, const struct plan *plan)
{
	struct window window = window_of(plan);
	int edges = edges_of(fd);
	struct epoll_event event;

	while (!window.over) {
		ssize_t n = recv(fd, in, sizeof(in), 0);

		if (n < 0 && errno == EAGAIN) {
			epoll_wait(edges, &event, 1, -1);
			continue;
		}
		if (n < 0)
			err(1, "recv");
		if (n == 0)
			errx(1, "the driver has gone");
		took(&window, n);
	}
	close(edges);
}

static int has_gone(ssize_t n)
{
	return n < 0 && errno != EAGAIN;
}

/* Until it is over, for the server; until the server has gone, for the driver. */
static void read_and_write(int fd, const struct plan *plan, int ends)
{
	struct window window = window_of(plan);

	while (!ends || !window.over) {
		struct pollfd event = {fd, POLLIN | POLLOUT, 0};
		ssize_t n;

		if (poll(&event, 1, -1) < 0)
			err(1, "poll");
		if (event.revents & (POLLIN | POLLHUP | POLLERR)) {
			n = recv(fd, in, sizeof(in), 0);
			if (n == 0 || has_gone(n))
				break;
			if (n > 0)
				took(&window, n);
		}
		if (event.revents & POLLOUT) {
			n = send(fd, out, plan->size, MSG_NOSIGNAL);
			if (has_gone(n))
				break;
			look_at_the_clock(&window);
		}
	}
	peer_has_gone(&window);
}

/* The driver's time has begun when its first bytes come, so that it does not end before it. */
static void wait_for_bytes(int fd)
{
	struct pollfd event = {fd, POLLIN, 0};

	if (poll(&event, 1, -1) < 0)
		err(1, "poll");
}

/* The driver asks, and says in each question whether another one will follow. */
static void ask_for(int fd, uint64_t talk_ns)
{
	char question[QUESTION] = {0};
	uint64_t end = now_ns() + talk_ns;

	do {
		question[0] = now_ns() < end;
		if (!send_all(fd, question, QUESTION) || !receive_all(fd, in, QUESTION))
			errx(1, "the server does not answer");
	} while (question[0]);
}

static void answer(int fd)
{
	char question[QUESTION];

	do {
		if (!receive_all(fd, question, QUESTION) || !send_all(fd, question, QUESTION))
			errx(1, "the driver has gone");
	} while (question[0]);
}

static void serve(const struct endpoint *own)
{
	int listener = listening(own);

	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
		struct plan plan;

		if (fd < 0)
			err(1, "accept");
		if (!receive_all(fd, (char *)&plan, sizeof(plan)))
			errx(1, "the driver has not said what to do");
		move_to(plan.server_cpu);
		if (plan.talk_ns)
			answer(fd);
		wait_for_bytes(fd);
		if (plan.how == DUPLEX)
			read_and_write(fd, &plan, 1);
		else
			read_only(fd, &plan);
		close(fd);
	}
}

static void drive(const struct endpoint *source, const struct endpoint *server,
		  const struct plan *plan)
{
	int fd = connected(source, server);

	make_nonblocking(fd);
	if (!send_all(fd, (const char *)plan, sizeof(*plan)))
		err(1, "send");
	if (plan->talk_ns)
		ask_for(fd, plan->talk_ns);
	if (plan->how == DUPLEX)
		read_and_write(fd, plan, 0);
	else
		write_only(fd, plan);
	close(fd);
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "serve")) {
		struct endpoint own = endpoint(argv[2], number(argv[3]));

		serve(&own);
	} else if (argc == 11 && !strcmp(argv[1], "drive")) {
		struct endpoint source = endpoint(argv[2], 0);
		struct endpoint server = endpoint(argv[3], number(argv[4]));
		struct plan plan = {
			.size = number(argv[5]),
			.how = number(argv[6]),
			.server_cpu = number(argv[7]),
			.talk_ns = number(argv[8]) * 1000000,
			.warmup_ns = number(argv[9]) * 1000000,
			.measure_ns = number(argv[10]) * 1000000,
		};

		if (plan.size < 1 || plan.size > MAX_WRITE)
			errx(2, "a write has 1 to %d bytes", MAX_WRITE);
		drive(&source, &server, &plan);
	} else {
		errx(2, "usage: stream serve ADDRESS PORT | drive SOURCE ADDRESS PORT SIZE HOW "
			"SERVER_CPU TALK_MS WARMUP_MS MEASURE_MS");
	}
	return 0;
}
