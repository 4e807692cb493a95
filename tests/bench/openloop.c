// SPDX-License-Identifier: Apache-2.0
/*
 * HTTP/1.1 requests at a fixed rate, for any behaviour of the server.
 *
 *   openloop ADDRESS PORT PATH RATE CONNECTIONS WARMUP MEASURE_MS
 *
 * wrk waits for an answer before it asks again, so a slow server is asked less often; h2load --rps
 * sends in bursts, one request per connection at once, and counts from when it got to sending. Here
 * request k is due at k / RATE seconds, and its latency counts from then, also while it waits for
 * one of the connections, which take turns. The warm-up is WARMUP requests at 1,000 a second,
 * whatever RATE is: enough for each connection to join. Prints "ready" once it is warm, waits for a
 * line, and prints in the form of tests/bed/wrk.lua: the totals (requests, microseconds, unanswered
 * after a second of grace, other answers than 200), then each latency in microseconds and its
 * count.
 * Those unanswered are counted with the time they have waited.
 */
#define _GNU_SOURCE
#include "endpoint.h"
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <unistd.h>

#define MAX_CONNECTIONS 256
#define SECOND_NS UINT64_C(1000000000)
#define GRACE_S 1
#define WARMUP_GRACE_S 20
#define WARMUP_RATE 1000
#define NO_LENGTH UINT64_MAX

static struct connection {
	int fd, busy;
	uint64_t due;
	char head[8192]; /* of the answer, until it is whole */
	size_t head_size;
	uint64_t body_left; /* NO_LENGTH while the head is not whole */
} connections[MAX_CONNECTIONS];

static char request[1024], buffer[1 << 18];
static unsigned connection_count, next_free, busy_count;
static int epoll;
static uint32_t *latencies;
static uint64_t answered, unsuccessful;

static void begin_request(struct connection *connection, uint64_t due)
{
	connection->busy = 1;
	connection->due = due;
	connection->head_size = 0;
	connection->body_left = NO_LENGTH;
	busy_count++;
	if (!send_all(connection->fd, request, strlen(request)))
		errx(1, "the server has closed a connection");
}

static void record(uint64_t due, uint64_t now)
{
	latencies[answered++] = (now - due) / 1000;
}

/* Reads the head that is whole now; returns how many of its bytes are of the body. */
static size_t read_head(struct connection *connection, const char *end)
{
	const char *length = strcasestr(connection->head, "\r\ncontent-length:");

	if (!length || length > end)
		errx(1, "an answer without Content-Length: %.80s", connection->head);
	connection->body_left = strtoull(length + strlen("\r\ncontent-length:"), NULL, 10);
	if (strncmp(connection->head, "HTTP/1.1 200", 12))
		unsuccessful++;
	return connection->head + connection->head_size - (end + 4);
}

/* Takes what has arrived. Returns 1 when the answer is complete. */
static int advance(struct connection *connection)
{
	while (connection->body_left) {
		int in_head = connection->body_left == NO_LENGTH;
		char *to = in_head ? connection->head + connection->head_size : buffer;
		size_t room = in_head ? sizeof(connection->head) - 1 - connection->head_size
				      : sizeof(buffer);
		ssize_t n = recv(connection->fd, to, room, MSG_DONTWAIT);

		if (n < 0 && errno == EAGAIN)
			return 0;
		if (n <= 0)
			err(1, "recv");
		if (in_head) {
			const char *end;

			connection->head_size += n;
			connection->head[connection->head_size] = 0;
			end = strstr(connection->head, "\r\n\r\n");
			if (!end)
				continue;
			n = read_head(connection, end);
		}
		if ((uint64_t)n > connection->body_left)
			errx(1, "an answer that was not asked for");
		connection->body_left -= n;
	}
	return 1;
}

static void wait_for_answers(uint64_t until)
{
	struct epoll_event events[64];
	uint64_t now = now_ns();
	uint64_t left = until > now ? until - now : 0;
	struct timespec timeout = {left / 1000000000, left % 1000000000};
	int count = epoll_pwait2(epoll, events, 64, &timeout, NULL);

	if (count < 0)
		err(1, "epoll_pwait2");
	for (int i = 0; i < count; i++) {
		struct connection *connection = events[i].data.ptr;

		if (!connection->busy || !advance(connection))
			continue;
		connection->busy = 0;
		busy_count--;
		record(connection->due, now_ns());
	}
}

/*
 * Sends request after request when it is due, until `count` are sent and answered. Returns how many
 * are not, grace_s after the last was due.
 */
static uint64_t run(uint64_t count, uint64_t rate, uint64_t grace_s)
{
	uint64_t start = now_ns(), sent = 0, in_time;
	uint64_t end = start + count * SECOND_NS / rate + grace_s * SECOND_NS;

	answered = unsuccessful = 0;
	while (answered < count && now_ns() < end) {
		uint64_t due = start + sent * SECOND_NS / rate;

		if (sent == count || busy_count == connection_count) {
			wait_for_answers(end);
		} else if (now_ns() < due) {
			wait_for_answers(due);
		} else {
			while (connections[next_free].busy)
				next_free = (next_free + 1) % connection_count;
			begin_request(&connections[next_free], due);
			next_free = (next_free + 1) % connection_count;
			sent++;
		}
	}
	in_time = answered;
	for (unsigned i = 0; i < connection_count; i++)
		if (connections[i].busy)
			record(connections[i].due, now_ns());
	for (; sent < count; sent++)
		record(start + sent * SECOND_NS / rate, now_ns());
	return count - in_time;
}

static void open_connections(const struct endpoint *server)
{
	struct endpoint any = endpoint(server->address.ss_family == AF_INET6 ? "::" : "0.0.0.0", 0);

	epoll = epoll_create1(0);
	for (unsigned i = 0; i < connection_count; i++) {
		struct epoll_event event = {EPOLLIN, {.ptr = &connections[i]}};

		connections[i].fd = connected(&any, server);
		make_nonblocking(connections[i].fd);
		if (epoll_ctl(epoll, EPOLL_CTL_ADD, connections[i].fd, &event))
			err(1, "epoll_ctl");
	}
}

static void report(uint64_t count, uint64_t rate, uint64_t unanswered)
{
	printf("totals %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", count,
	       count * 1000000 / rate, unanswered, unsuccessful);
	for (uint64_t i = 0; i < count; i++)
		printf("latency %" PRIu32 " 1\n", latencies[i]);
}

int main(int argc, char **argv)
{
	uint64_t rate, warmup, count;
	struct endpoint server;

	if (argc != 8)
		errx(2, "usage: openloop ADDRESS PORT PATH RATE CONNECTIONS WARMUP MEASURE_MS");
	server = endpoint(argv[1], number(argv[2]));
	snprintf(request, sizeof(request), "GET %s HTTP/1.1\r\nHost: service\r\n\r\n", argv[3]);
	rate = number(argv[4]);
	connection_count = number(argv[5]);
	warmup = number(argv[6]);
	count = number(argv[7]) * rate / 1000;
	if (!rate || connection_count < 1 || connection_count > MAX_CONNECTIONS)
		errx(2, "at least 1 request a second over 1 to %d connections", MAX_CONNECTIONS);
	latencies = calloc(count > warmup ? count : warmup, sizeof(*latencies));
	if (!latencies)
		err(1, "calloc");
	prctl(PR_SET_TIMERSLACK, 1); /* ns; the default of 50 us would be half of a latency */
	open_connections(&server);
	if (run(warmup, WARMUP_RATE, WARMUP_GRACE_S))
		errx(1, "%u requests of the warm-up have no answer", busy_count);
	puts("ready");
	fflush(stdout);
	if (getchar() == EOF)
		return 1;
	report(count, rate, run(count, rate, GRACE_S));
	return 0;
}
