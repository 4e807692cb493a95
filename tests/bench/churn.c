// SPDX-License-Identifier: Apache-2.0
/*
 * Short connections, one after the other: connect, one request of 64 bytes, one answer, close.
 *
 * Both ends are event loops: they read until there is nothing more, then wait by poll.
 *
 *   churn serve ADDRESS PORT        prints "ready"; answers once, then closes
 *   churn ask SOURCE ADDRESS PORT ANSWER WRITE SERVER_CPU WARMUP_MS MEASURE_MS
 *                                   prints "connections nanoseconds cpu_nanoseconds", then for
 *                                   each connection the nanoseconds of its connect and of all of
 *                                   it
 *
 * An answer has ANSWER bytes, in writes of WRITE; the server moves to SERVER_CPU first. It closes
 * first, as HTTP/1.0 does: the client's ports do not run out in TIME_WAIT. Each answer tells the
 * CPU time that the server has used, which the printed total includes.
 */
#define _GNU_SOURCE
#include "endpoint.h"
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#define REQUEST 64
#define MAX_WRITE (1 << 20)
#define READ_SIZE (1 << 18)
#define MIN_CONNECTIONS 10 /* for a median and a slowest one */
#define MAX_CONNECTIONS (1 << 20)

static char out[MAX_WRITE], in[READ_SIZE];

/* What the client asks for, in the request's first bytes. */
struct plan {
	uint64_t answer, write, server_cpu;
};

static struct times {
	uint64_t connect, whole;
} times[MAX_CONNECTIONS];

static void answer(int fd, const struct plan *plan)
{
	uint64_t used = cpu_ns();

	memcpy(out, &used, sizeof(used));
	for (uint64_t sent = 0; sent < plan->answer; sent += plan->write) {
		uint64_t left = plan->answer - sent;

		if (!send_all(fd, out, left < plan->write ? left : plan->write))
			return;
	}
}

static void serve(const struct endpoint *own)
{
	int listener = listening(own);
	uint64_t cpu = UINT64_MAX;

	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
		struct plan plan;

		if (fd < 0)
			err(1, "accept");
		if (receive_all(fd, in, REQUEST)) {
			memcpy(&plan, in, sizeof(plan));
			if (plan.server_cpu != cpu)
				move_to(cpu = plan.server_cpu);
			answer(fd, &plan);
		}
		close(fd);
	}
}

/* One connection; returns the server's CPU time before its answer. */
static uint64_t exchange(const struct endpoint *source, const struct endpoint *server,
			 const struct plan *plan, struct times *took)
{
	uint64_t start = now_ns(), server_cpu, left = plan->answer - sizeof(server_cpu);
	char request[REQUEST] = {0};
	int fd = connected(source, server);

	took->connect = now_ns() - start;
	make_nonblocking(fd);
	memcpy(request, plan, sizeof(*plan));
	if (!send_all(fd, request, sizeof(request)) ||
	    !receive_all(fd, (char *)&server_cpu, sizeof(server_cpu)))
		errx(1, "no answer");
	while (left) {
		size_t n = receive_some(fd, in, sizeof(in));

		if (n == 0 || n > left)
			errx(1, "not the answer");
		left -= n;
	}
	if (receive_all(fd, in, 1))
		errx(1, "more than an answer");
	close(fd);
	took->whole = now_ns() - start;
	return server_cpu;
}

static void ask(const struct endpoint *source, const struct endpoint *server,
		const struct plan *plan, uint64_t warmup_ms, uint64_t measure_ms)
{
	uint64_t begin, end, own, servers = 0;
	struct times extra;
	size_t count = 0;

	for (end = now_ns() + warmup_ms * 1000000; now_ns() < end;)
		exchange(source, server, plan, &extra);
	own = cpu_ns();
	begin = now_ns();
	while (count < MIN_CONNECTIONS ||
	       (count < MAX_CONNECTIONS && now_ns() < begin + measure_ms * 1000000)) {
		uint64_t used = exchange(source, server, plan, &times[count]);

		if (count++ == 0)
			servers = used;
	}
	end = now_ns();
	own = cpu_ns() - own;
	servers = exchange(source, server, plan, &extra) - servers;
	printf("%zu %" PRIu64 " %" PRIu64 "\n", count, end - begin, own + servers);
	for (size_t i = 0; i < count; i++)
		printf("%" PRIu64 " %" PRIu64 "\n", times[i].connect, times[i].whole);
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "serve")) {
		struct endpoint own = endpoint(argv[2], number(argv[3]));

		serve(&own);
	} else if (argc == 10 && !strcmp(argv[1], "ask")) {
		struct endpoint source = endpoint(argv[2], 0);
		struct endpoint server = endpoint(argv[3], number(argv[4]));
		struct plan plan = {number(argv[5]), number(argv[6]), number(argv[7])};

		if (plan.answer < sizeof(uint64_t) || plan.write < sizeof(uint64_t) ||
		    plan.write > MAX_WRITE)
			errx(2, "an answer has 8 bytes or more, and a write 8 to %d", MAX_WRITE);
		ask(&source, &server, &plan, number(argv[8]), number(argv[9]));
	} else {
		errx(2, "usage: churn serve ADDRESS PORT | ask SOURCE ADDRESS PORT ANSWER WRITE "
			"SERVER_CPU WARMUP_MS MEASURE_MS");
	}
	return 0;
}
