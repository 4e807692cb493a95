// SPDX-License-Identifier: Apache-2.0
/*
 * Short connections, one after the other: connect, one request, one answer, close.
 *
 *   churn serve ADDRESS PORT                  prints "ready"; answers once, then closes
 *   churn ask SOURCE ADDRESS PORT WARMUP_MS MEASURE_MS
 *                                             prints "connections nanoseconds cpu_nanoseconds",
 *                                             then for each connection the nanoseconds of its
 *                                             connect and of all of it
 *
 * The server closes first, as HTTP/1.0 does: the client's ports do not run out in TIME_WAIT. Each
 * answer tells the CPU time that the server has used, which the printed total includes.
 */
#include "endpoint.h"
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#define MESSAGE 64
#define MAX_CONNECTIONS (1 << 20)

static struct times {
	uint64_t connect, whole;
} times[MAX_CONNECTIONS];

static void serve(const struct endpoint *own)
{
	int listener = listening(own);
	char message[MESSAGE] = {0};

	puts("ready");
	fflush(stdout);
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		uint64_t used = cpu_ns();

		if (fd < 0)
			err(1, "accept");
		if (receive_all(fd, message, sizeof(message))) {
			memcpy(message, &used, sizeof(used));
			send_all(fd, message, sizeof(message));
		}
		close(fd);
	}
}

/* One connection; returns the server's CPU time so far. */
static uint64_t exchange(const struct endpoint *source, const struct endpoint *server,
			 struct times *took)
{
	char message[MESSAGE] = {0};
	uint64_t start = now_ns(), server_cpu;
	int fd = connected(source, server);

	took->connect = now_ns() - start;
	if (!send_all(fd, message, sizeof(message)) || !receive_all(fd, message, sizeof(message)))
		errx(1, "no answer");
	memcpy(&server_cpu, message, sizeof(server_cpu));
	if (receive_all(fd, message, 1))
		errx(1, "more than an answer");
	close(fd);
	took->whole = now_ns() - start;
	return server_cpu;
}

static void ask(const struct endpoint *source, const struct endpoint *server, uint64_t warmup_ms,
		uint64_t measure_ms)
{
	uint64_t begin, end, own, servers = 0;
	struct times extra;
	size_t count = 0;

	for (end = now_ns() + warmup_ms * 1000000; now_ns() < end;)
		exchange(source, server, &extra);
	own = cpu_ns();
	begin = now_ns();
	while (count < MAX_CONNECTIONS && now_ns() < begin + measure_ms * 1000000) {
		uint64_t used = exchange(source, server, &times[count]);

		if (count++ == 0)
			servers = used;
	}
	end = now_ns();
	own = cpu_ns() - own;
	servers = exchange(source, server, &extra) - servers;
	printf("%zu %" PRIu64 " %" PRIu64 "\n", count, end - begin, own + servers);
	for (size_t i = 0; i < count; i++)
		printf("%" PRIu64 " %" PRIu64 "\n", times[i].connect, times[i].whole);
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "serve")) {
		struct endpoint own = endpoint(argv[2], number(argv[3]));

		serve(&own);
	} else if (argc == 7 && !strcmp(argv[1], "ask")) {
		struct endpoint source = endpoint(argv[2], 0);
		struct endpoint server = endpoint(argv[3], number(argv[4]));

		ask(&source, &server, number(argv[5]), number(argv[6]));
	} else {
		errx(2, "usage: churn serve ADDRESS PORT | "
			"ask SOURCE ADDRESS PORT WARMUP_MS MEASURE_MS");
	}
	return 0;
}
