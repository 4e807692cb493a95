// SPDX-License-Identifier: Apache-2.0
/*
 * The traffic of the stream fuzzer.
 *
 *   stream serve SEED KILLS ADDRESS PORT PORT        listens on both; TCP_DEFER_ACCEPT on the
 * second stream drive SEED KILLS SOURCE ADDRESS PORT PORT FIRST COUNT SECONDS ATONCE makes
 * connections FIRST, FIRST + 1, ... until COUNT (0: no end) or SECONDS are over
 *
 * Every byte a socket receives is compared with what its place in the stream says it must be.
 * Worker processes do the work; with KILLS (a rate per 100 s) the parent kills them with SIGKILL
 * now and then and starts others. It reports in lines of JSON on standard output:
 *
 *   ready, mismatch, short (a stream ended early), woken (a blocking read got nothing), stalled,
 * killed, crashed, refused, done
 *
 * A stream that ended early is no error if its connection was planned to be aborted, or if a
 * process at its other end was killed. The lines of both ends together tell which it was.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "plan.h"

#define MAGIC 0x74626673 /* begins every connection, then comes its number */
#define BUFFER (1 << 20)
#define WORKERS 3
#define MAX_SLOTS 64
#define STALLED_MS 30000
#define DIAGNOSIS_MS 3000

/* ---- What the processes share ------------------------------------------------------------ */

/* One connection at this end, as the parent sees it. */
struct slot {
	_Atomic uint32_t number; /* 0 until known; the connection's number plus one */
	_Atomic uint32_t port;	 /* the client's; 0: no connection */
	_Atomic int64_t said, heard;
	_Atomic int64_t progress_ms;
	_Atomic int reported;
};

struct worker {
	pid_t pid;
	struct slot slots[MAX_SLOTS];
};

static struct shared {
	_Atomic uint32_t next;
	_Atomic int stop;
	_Atomic int64_t connections, aborted, said, heard, mismatches;
	_Atomic int64_t by_kind[KINDS];
	struct worker workers[WORKERS];
} * shared;

/* IPv4 or IPv6; the port lies at the same place in both. */
struct address {
	socklen_t size;
	union {
		struct sockaddr any;
		struct sockaddr_in v4;
		struct sockaddr_in6 v6;
	};
};

static struct {
	enum side side;
	uint64_t seed;
	unsigned kills;
	struct address source, target[2]; /* target: the listeners' addresses */
	uint32_t first, count;
	int seconds, at_once;
	int listeners[2];
} run;

static int64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000LL + t.tv_nsec / 1000000;
}

static void nap(unsigned microseconds)
{
	struct timespec t = {microseconds / 1000000, microseconds % 1000000 * 1000L};

	nanosleep(&t, NULL);
}

/* One line of JSON, written at once so that processes do not mix theirs. */
static void tell(const char *format, ...)
{
	char line[1024];
	va_list arguments;
	int size;

	va_start(arguments, format);
	size = vsnprintf(line, sizeof(line), format, arguments);
	va_end(arguments);
	if (write(STDOUT_FILENO, line, size) != size)
		_exit(1);
}

/* ---- One end of a connection --------------------------------------------------------------- */

enum outcome { FINE, ENDED, LEFT }; /* the stream ended early; this end left as planned */

/* What one direction says: word i of it is mix(key + i). */
struct voice {
	uint64_t key;
	int64_t position;
};

struct end {
	int fd;
	enum side side;
	const struct plan *plan;
	struct slot *slot;
	struct voice mine, theirs;
	struct dice dice; /* of this end alone: chunk sizes and pauses */
	char *buffer;	  /* BUFFER bytes */
	int poller;	  /* an epoll, as manner.waiting has it; -1: none */
	int is_ready;	  /* there are bytes, as an edge-triggered end believes */
	int has_hung_up;  /* the other end has: a short read is not the end then, epoll(7) */
};

static const struct manner *manner_of(const struct end *end)
{
	return &end->plan->manner[end->side];
}

static uint64_t key_of(uint32_t number, enum side speaker)
{
	return mix(run.seed ^ mix(number * 2ULL + speaker));
}

static unsigned char byte_at(uint64_t key, int64_t position)
{
	return mix(key + position / 8) >> position % 8 * 8;
}

static void speak(const struct voice *voice, char *buffer, int64_t size)
{
	int64_t done = 0;

	for (; done < size && (voice->position + done) % 8; done++)
		buffer[done] = byte_at(voice->key, voice->position + done);
	for (; done + 8 <= size; done += 8) {
		uint64_t word = mix(voice->key + (voice->position + done) / 8);

		memcpy(buffer + done, &word, 8);
	}
	for (; done < size; done++)
		buffer[done] = byte_at(voice->key, voice->position + done);
}

/* Where eight bytes come from, if from any recent stream: a swap, a loss or a stranger's. */
static void find_origin(uint32_t number, const char *bytes, char *text, size_t size)
{
	uint64_t word;

	memcpy(&word, bytes, 8);
	for (uint32_t n = number > 64 ? number - 64 : 0; n < number + 64; n++)
		for (int speaker = 0; speaker < 2; speaker++) {
			uint64_t key = key_of(n, speaker), low = mix(key);

			for (int64_t i = 0; i < BUFFER; i++) {
				uint64_t high = mix(key + i + 1);

				for (int shift = 0; shift < 64; shift += 8)
					if (word ==
					    (low >> shift | (shift ? high << (64 - shift) : 0))) {
						snprintf(text, size,
							 "said by the %s of connection %u at %lld",
							 speaker ? "server" : "client", n,
							 (long long)(i * 8 + shift / 8));
						return;
					}
				low = high;
			}
		}
	snprintf(text, size, "of no stream");
}

static void report_mismatch(struct end *end, const char *data, int64_t size, int64_t at)
{
	char origin[128] = "too few bytes to tell";

	if (size - at >= 8)
		find_origin(end->plan->number, data + at, origin, sizeof(origin));
	shared->mismatches++;
	tell("{\"event\":\"mismatch\",\"connection\":%u,\"kind\":%d,\"port\":%u,\"heard_by\":%d,"
	     "\"position\":%lld,\"reading\":%d,\"writing\":%d,\"found\":\"%s\"}\n",
	     end->plan->number, end->plan->kind, end->slot->port, end->side,
	     (long long)(end->theirs.position + at), manner_of(end)->reading,
	     end->plan->manner[!end->side].writing, origin);
}

/* Compares with what must come next. Returns 0 when it does not fit. */
static int verify(struct end *end, const char *data, int64_t size)
{
	static _Thread_local char expected[4096];
	struct voice voice = end->theirs;

	for (int64_t done = 0; done < size; voice.position += sizeof(expected)) {
		int64_t part = at_most(size - done, sizeof(expected));

		speak(&voice, expected, part);
		if (memcmp(expected, data + done, part)) {
			int64_t at = done;

			while (data[at] == expected[at - done])
				at++;
			report_mismatch(end, data, size, at);
			return 0;
		}
		done += part;
	}
	return 1;
}

static void progress(struct end *end, int64_t said, int64_t heard)
{
	end->slot->said += said;
	end->slot->heard += heard;
	end->slot->progress_ms = now_ms();
	shared->said += said;
	shared->heard += heard;
}

/* The stream ended before its time: EOF (error 0) or an errno. Expected if the other end aborts. */
static enum outcome ended_early(const struct end *end, const char *what, int error)
{
	const struct plan *plan = end->plan;

	if (!(plan->aborts && plan->abort_by != end->side))
		tell("{\"event\":\"short\",\"connection\":%u,\"kind\":%d,\"port\":%u,\"side\":%d,"
		     "\"what\":\"%s\",\"error\":\"%s\",\"said\":%lld,\"heard\":%lld}\n",
		     plan->number, plan->kind, end->slot->port, end->side, what,
		     error ? strerror(error) : "end of stream", (long long)end->mine.position,
		     (long long)end->theirs.position);
	return ENDED;
}

/* Leaves in the middle, if it is time to. */
static int leaves(struct end *end)
{
	const struct plan *plan = end->plan;
	struct linger hard = {1, 0};

	if (!plan->aborts || plan->abort_by != end->side ||
	    end->mine.position + end->theirs.position < plan->abort_at)
		return 0;
	if (plan->abort_hard)
		setsockopt(end->fd, SOL_SOCKET, SO_LINGER, &hard, sizeof(hard));
	return 1;
}

static void set_nonblocking(int fd, int nonblocking)
{
	int flags = fcntl(fd, F_GETFL);

	fcntl(fd, F_SETFL, nonblocking ? flags | O_NONBLOCK : flags & ~O_NONBLOCK);
}

static void wait_for(int fd, short events)
{
	struct pollfd poller = {fd, events, 0};

	poll(&poller, 1, -1);
}

/* ---- Reading -------------------------------------------------------------------------------- */

static ssize_t receive_into_two(int fd, char *buffer, size_t size)
{
	size_t half = size / 3;
	struct iovec parts[2] = {{buffer, half}, {buffer + half, size - half}};

	return readv(fd, parts, 2);
}

/* Must not block in recv: when the overhead of small packets fills the receive buffer, poll is
 * early, and a recv that has taken fewer bytes than the mark sleeps until that many *more* have
 * come (tcp_data_ready): over plain TCP, too, for ever. */
static ssize_t receive_above_mark(int fd, char *buffer, size_t size)
{
	int mark = at_most(size, 1 << 15);

	setsockopt(fd, SOL_SOCKET, SO_RCVLOWAT, &mark, sizeof(mark));
	wait_for(fd, POLLIN);
	return recv(fd, buffer, size, MSG_DONTWAIT);
}

static ssize_t receive_after_peek(int fd, char *buffer, size_t size)
{
	static _Thread_local char peeked[4096];
	ssize_t seen = recv(fd, peeked, at_most(size, sizeof(peeked)), MSG_PEEK);
	ssize_t got;

	if (seen <= 0)
		return seen;
	got = recv(fd, buffer, size, 0);
	if (got > 0 && memcmp(peeked, buffer, at_most(got, seen)))
		buffer[0] ^= 0xff; /* peek and read disagree: let it be found as a mismatch */
	return got;
}

static ssize_t receive_by_poll(int fd, char *buffer, size_t size)
{
	wait_for(fd, POLLIN);
	return recv(fd, buffer, size, MSG_DONTWAIT);
}

static ssize_t receive_as(enum reading reading, int fd, char *buffer, size_t size)
{
	switch (reading) {
	case RECV_TWO_BUFFERS:
		return receive_into_two(fd, buffer, size);
	case RECV_WAITALL:
		return recv(fd, buffer, size, MSG_WAITALL);
	case RECV_LOWAT:
		return receive_above_mark(fd, buffer, size);
	case RECV_PEEK:
		return receive_after_peek(fd, buffer, size);
	case RECV_POLL:
		return receive_by_poll(fd, buffer, size);
	default:
		return recv(fd, buffer, size, 0);
	}
}

static void dawdle(struct end *end, int64_t size)
{
	switch (manner_of(end)->reads) {
	case SLOW:
		if (chance(&end->dice, 100))
			nap(below(&end->dice, 5000));
		break;
	case BURSTY:
		if (chance(&end->dice, at_most(1 + size / 256, 1024)))
			nap(20000 + below(&end->dice, 40000));
		break;
	default:
		break;
	}
}

#define EDGES (EPOLLIN | EPOLLRDHUP | EPOLLET)

static int open_poller(int fd, const struct manner *manner)
{
	struct epoll_event event = {.events = manner->waiting == LEVEL ? EPOLLIN : EDGES};
	int poller = epoll_create1(EPOLL_CLOEXEC);

	if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event))
		err(1, "epoll_ctl");
	return poller;
}

static void await_bytes(struct end *end)
{
	struct epoll_event event;

	if (end->poller < 0)
		return wait_for(end->fd, POLLIN);
	while (epoll_wait(end->poller, &event, 1, -1) < 0)
		if (errno != EINTR)
			err(1, "epoll_wait");
	end->has_hung_up |= (event.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
	end->is_ready = 1;
}

/* An event loop's read. */
static ssize_t take_by_events(struct end *end, char *buffer, int64_t size)
{
	const struct manner *manner = manner_of(end);
	ssize_t got;

	for (;;) {
		if (!end->is_ready)
			await_bytes(end);
		got = receive_as(manner->reading, end->fd, buffer, size);
		if (got >= 0 || (errno != EAGAIN && errno != EINTR))
			break;
		end->is_ready = end->has_hung_up || manner->waiting == POLL;
		if (end->is_ready)
			nap(1000);
	}
	if (manner->waiting == LEVEL || (manner->waiting == SHORT && got < size))
		end->is_ready = end->has_hung_up;
	return got;
}

static ssize_t take_blocking(struct end *end, char *buffer, int64_t size)
{
	enum reading reading = manner_of(end)->reading;
	ssize_t got;

	do {
		got = receive_as(reading, end->fd, buffer, size);
		/* Blocked, and woken without data: TCP never does that. */
		if (got < 0 && errno == EAGAIN && reading != RECV_POLL && reading != RECV_LOWAT) {
			tell("{\"event\":\"woken\",\"connection\":%u,\"port\":%u,\"side\":%d}\n",
			     end->plan->number, end->slot->port, end->side);
		}
	} while (got < 0 && (errno == EAGAIN || errno == EINTR));
	return got;
}

/* Reads up to `size` bytes in the end's manner: > 0, 0 at the end of the stream, or -errno. */
static ssize_t take(struct end *end, char *buffer, int64_t size)
{
	const struct manner *manner = manner_of(end);
	ssize_t got;

	size = at_most(size, 1 + below(&end->dice, manner->largest_read));
	dawdle(end, size);
	got = manner->is_nonblocking ? take_by_events(end, buffer, size)
				     : take_blocking(end, buffer, size);
	if (got > 0)
		progress(end, 0, got);
	return got < 0 ? -errno : got;
}

/* Reads and verifies exactly `size` bytes. */
static enum outcome hear(struct end *end, int64_t size)
{
	while (size > 0) {
		ssize_t got;

		if (leaves(end))
			return LEFT;
		got = take(end, end->buffer, at_most(size, BUFFER));
		if (got <= 0)
			return ended_early(end, "reading", -got);
		if (!verify(end, end->buffer, got))
			return LEFT;
		end->theirs.position += got;
		size -= got;
	}
	return FINE;
}

/* The end of the stream, and no byte before it. */
static enum outcome hear_end(struct end *end)
{
	ssize_t got = take(end, end->buffer, 1);

	if (got > 0)
		report_mismatch(end, end->buffer, got, 0);
	return got ? ended_early(end, "awaiting the end", got < 0 ? -got : 0) : FINE;
}

/* ---- Writing -------------------------------------------------------------------------------- */

static ssize_t send_from_two(int fd, const char *data, size_t size, int several)
{
	size_t half = size / 3;
	struct iovec parts[2] = {{(void *)data, half}, {(void *)data + half, size - half}};
	struct mmsghdr messages[2] = {{{.msg_iov = parts, .msg_iovlen = 1}, 0},
				      {{.msg_iov = parts + 1, .msg_iovlen = 1}, 0}};
	int sent;

	if (!several)
		return writev(fd, parts, 2);
	sent = sendmmsg(fd, messages + !half, 1 + !!half, MSG_NOSIGNAL);
	if (sent <= 0)
		return sent;
	return messages[!half].msg_len + (sent > 1 ? messages[1].msg_len : 0);
}

/* A file of its own each time: the socket takes its pages, not copies of them. */
static ssize_t send_from_file(int fd, const char *data, size_t size)
{
	int file = memfd_create("stream", MFD_CLOEXEC), error;
	off_t from = 0;
	ssize_t sent;

	if (pwrite(file, data, size, 0) != (ssize_t)size)
		err(1, "memfd");
	sent = sendfile(fd, file, &from, size);
	error = errno;
	close(file);
	errno = error;
	return sent;
}

static ssize_t send_by_poll(int fd, const char *data, size_t size)
{
	ssize_t sent;

	while ((sent = send(fd, data, size, MSG_NOSIGNAL | MSG_DONTWAIT)) < 0 && errno == EAGAIN)
		wait_for(fd, POLLOUT);
	return sent;
}

static ssize_t send_as(struct end *end, const char *data, size_t size, int last)
{
	switch (manner_of(end)->writing) {
	case SEND_TWO_BUFFERS:
		return send_from_two(end->fd, data, size, 0);
	case SEND_MMSG:
		return send_from_two(end->fd, data, size, 1);
	case SEND_MORE:
		return send(end->fd, data, size, MSG_NOSIGNAL | (last ? 0 : MSG_MORE));
	case SEND_FILE:
		return send_from_file(end->fd, data, size);
	case SEND_POLL:
		return send_by_poll(end->fd, data, size);
	default:
		return send(end->fd, data, size, MSG_NOSIGNAL);
	}
}

/* Says the next `size` bytes in the end's manner. The buffer is not the one that `hear` uses. */
static enum outcome say(struct end *end, char *buffer, int64_t size)
{
	const struct manner *manner = manner_of(end);

	while (size > 0) {
		int64_t part = at_most(size, 1 + below(&end->dice, manner->largest_write));
		ssize_t sent;

		if (leaves(end))
			return LEFT;
		if (chance(&end->dice, manner->pause_chance))
			nap(below(&end->dice, 3000));
		speak(&end->mine, buffer, part);
		while ((sent = send_as(end, buffer, part, part == size)) < 0 && errno == EAGAIN &&
		       manner->is_nonblocking)
			wait_for(end->fd, POLLOUT);
		if (sent < 0)
			return ended_early(end, "writing", errno);
		progress(end, sent, 0);
		end->mine.position += sent;
		size -= sent;
	}
	return FINE;
}

/* ---- The kinds of connections ------------------------------------------------------------------
 */

struct turn {
	struct end *end;
	int64_t size;
	int speaks;
	enum outcome outcome;
};

static void *take_turn(void *argument)
{
	struct turn *turn = argument;

	turn->outcome = turn->speaks ? say(turn->end, turn->end->buffer, turn->size)
				     : hear(turn->end, turn->size);
	return NULL;
}

static enum outcome turn(struct end *end, int64_t size, int speaks)
{
	struct turn turn = {end, size, speaks, FINE};
	int toggles = manner_of(end)->toggles;
	pthread_t thread;

	if (toggles) {
		wait_for(end->fd, speaks ? POLLOUT : POLLIN);
		set_nonblocking(end->fd, 0);
	}
	if (end->plan->thread_per_turn && !pthread_create(&thread, NULL, take_turn, &turn))
		pthread_join(thread, NULL);
	else
		take_turn(&turn);
	if (toggles)
		set_nonblocking(end->fd, 1);
	return turn.outcome;
}

/* Small exchanges, over some passes: the connection becomes known, and joins. */
static enum outcome greet(struct end *end)
{
	struct dice sizes = dice_of(run.seed, end->plan->number, 8);

	for (uint32_t n = 0; n < 2 * end->plan->greetings; n++) {
		enum outcome outcome =
			turn(end, any_size(&sizes, 300), n % 2 == (uint32_t)end->side);

		if (outcome != FINE)
			return outcome;
		if (end->side == CLIENT)
			nap(below(&end->dice, 2000));
	}
	return FINE;
}

static enum outcome ping_pong(struct end *end)
{
	const struct plan *plan = end->plan;
	struct dice turns = dice_of(run.seed, plan->number, 1);
	enum side speaker = plan->first;

	for (uint32_t n = 0; n < plan->turns; n++, speaker = !speaker) {
		enum outcome outcome = turn(end, turn_size(&turns, plan), speaker == end->side);

		if (outcome != FINE)
			return outcome;
	}
	set_nonblocking(end->fd, manner_of(end)->is_nonblocking);
	shutdown(end->fd, SHUT_WR);
	return hear_end(end);
}

static void *say_everything(void *argument)
{
	struct end *end = argument;
	char *buffer = malloc(BUFFER + 1);
	enum outcome outcome = say(end, buffer, end->plan->bytes[end->side]);

	shutdown(end->fd, SHUT_WR);
	free(buffer);
	return outcome == FINE ? NULL : end;
}

static enum outcome duplex(struct end *end)
{
	struct end writing = *end;
	enum outcome outcome;
	pthread_t thread;
	void *failed;

	writing.dice = dice_of(run.seed, end->plan->number, 4 + end->side);
	if (pthread_create(&thread, NULL, say_everything, &writing))
		err(1, "pthread_create");
	outcome = hear(end, end->plan->bytes[!end->side]);
	if (outcome == FINE)
		outcome = hear_end(end);
	else
		shutdown(end->fd, SHUT_RDWR);
	pthread_join(thread, &failed);
	return failed ? ENDED : outcome;
}

static enum outcome one_way(struct end *end)
{
	enum outcome outcome;

	if (end->plan->first == end->side)
		return say(end, end->buffer, end->plan->bytes[end->side]);
	outcome = hear(end, end->plan->bytes[!end->side]);
	return outcome == FINE ? hear_end(end) : outcome;
}

/* Sends until it would block or all is said. Returns 0 when the stream has broken. */
static int say_what_fits(struct end *end, int64_t *left)
{
	while (*left > 0) {
		int64_t part = at_most(*left, 1 + below(&end->dice, manner_of(end)->largest_write));
		ssize_t sent;

		speak(&end->mine, end->buffer, part);
		sent = send(end->fd, end->buffer, part, MSG_NOSIGNAL);
		if (sent < 0)
			return errno == EAGAIN;
		progress(end, sent, 0);
		end->mine.position += sent;
		*left -= sent;
		if (!*left)
			shutdown(end->fd, SHUT_WR);
	}
	return 1;
}

/* Reads as its manner has it. Returns 0 when the stream has ended or broken. */
static int hear_what_is_there(struct end *end)
{
	enum waiting waiting = manner_of(end)->waiting;

	for (;;) {
		int64_t size = 1 + below(&end->dice, manner_of(end)->largest_read);
		ssize_t got = recv(end->fd, end->buffer, size, 0);

		if (got < 0)
			return errno == EAGAIN;
		if (!got)
			return 0;
		progress(end, 0, got);
		if (!verify(end, end->buffer, got))
			return errno = EBADMSG, 0;
		end->theirs.position += got;
		dawdle(end, size);
		if (waiting == LEVEL || (waiting == SHORT && got < size && !end->has_hung_up))
			return 1;
	}
}

/* What the loop asks epoll for; edge-triggered, all of it and for good. */
static void ask_for_events(struct end *end, int poller, int hearing, int64_t left)
{
	struct epoll_event event = {.events = EDGES | EPOLLOUT};

	if (manner_of(end)->waiting == LEVEL)
		event.events = (hearing ? EPOLLIN : 0) | (left ? EPOLLOUT : 0);
	else if (end->is_ready++)
		return;
	if (epoll_ctl(poller, EPOLL_CTL_MOD, end->fd, &event))
		err(1, "epoll_ctl");
}

static enum outcome events(struct end *end)
{
	int64_t left = end->plan->bytes[end->side];
	int64_t theirs = end->theirs.position + end->plan->bytes[!end->side];
	struct epoll_event event = {.events = 0};
	int poller = epoll_create1(EPOLL_CLOEXEC);
	enum outcome outcome = FINE;
	int hearing = 1;

	epoll_ctl(poller, EPOLL_CTL_ADD, end->fd, &event);
	end->is_ready = 0;
	while (hearing || left) {
		ask_for_events(end, poller, hearing, left);
		if (epoll_wait(poller, &event, 1, -1) < 0 && errno != EINTR)
			err(1, "epoll_wait");
		end->has_hung_up |= (event.events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
		errno = 0;
		if (leaves(end)) {
			outcome = LEFT;
			break;
		}
		if (hearing)
			hearing = hear_what_is_there(end);
		if ((!hearing && end->theirs.position < theirs) || !say_what_fits(end, &left)) {
			outcome = errno == EBADMSG ? LEFT : ended_early(end, "events", errno);
			break;
		}
	}
	close(poller);
	if (outcome == FINE && end->theirs.position != theirs)
		report_mismatch(end, end->buffer, 0, 0);
	return outcome;
}

/* ---- FRAMES: framed messages of several writers
 * --------------------------------------------------
 */

struct frame {
	uint16_t size; /* with this header */
	uint16_t writer;
	uint32_t sequence;
};

struct writers {
	struct end *end;
	pthread_mutex_t lock;
	struct writer {
		struct writers *all;
		uint32_t index;
		pthread_t thread;
	} one[8];
	_Atomic int broken;
};

static uint64_t frame_key(const struct end *end, enum side speaker, const struct frame *frame)
{
	return mix(key_of(end->plan->number, speaker) ^
		   ((uint64_t)frame->writer << 32 | frame->sequence));
}

/* Whole, where that is in this end's power: a non-blocking send may take a part of it. */
static ssize_t send_frame(struct end *end, const char *buffer, size_t size)
{
	size_t done = 0;

	while (done < size) {
		ssize_t sent = send(end->fd, buffer + done, size - done, MSG_NOSIGNAL);

		if (sent < 0 && errno == EAGAIN && manner_of(end)->is_nonblocking) {
			wait_for(end->fd, POLLOUT);
			continue;
		}
		if (sent < 0 || !end->plan->locked)
			return sent;
		done += sent;
	}
	return done;
}

static void *write_frames(void *argument)
{
	struct writer *writer = argument;
	struct writers *all = writer->all;
	struct end *end = all->end;
	struct dice dice = dice_of(run.seed, end->plan->number, 16 + end->side * 8 + writer->index);
	char buffer[FRAME_LIMIT];

	for (uint32_t n = 0; n < end->plan->frames && !all->broken; n++) {
		struct frame frame = {sizeof(frame) + any_size(&dice, FRAME_LIMIT - 8),
				      writer->index, n};
		struct voice voice = {frame_key(end, end->side, &frame), 0};
		ssize_t sent;

		memcpy(buffer, &frame, sizeof(frame));
		speak(&voice, buffer + sizeof(frame), frame.size - sizeof(frame));
		if (end->plan->locked)
			pthread_mutex_lock(&all->lock);
		sent = send_frame(end, buffer, frame.size);
		if (end->plan->locked)
			pthread_mutex_unlock(&all->lock);
		if (sent != frame.size) {
			if (!all->broken++)
				ended_early(end, "writing a frame", sent < 0 ? errno : 0);
			break;
		}
		progress(end, sent, 0);
		if (chance(&dice, 30))
			nap(below(&dice, 2000));
	}
	return NULL;
}

static enum outcome take_all(struct end *end, char *buffer, int64_t size)
{
	while (size > 0) {
		ssize_t got = take(end, buffer, size);

		if (got <= 0)
			return ended_early(end, "reading a frame", -got);
		buffer += got;
		size -= got;
	}
	return FINE;
}

static enum outcome hear_frames(struct end *end)
{
	uint32_t expected[8] = {0};

	for (uint32_t left = end->plan->writers * end->plan->frames; left; left--) {
		struct frame frame;
		struct voice voice = {0, 0};
		char payload[FRAME_LIMIT];
		int64_t size;

		if (take_all(end, (char *)&frame, sizeof(frame)))
			return ENDED;
		size = (int64_t)frame.size - sizeof(frame);
		if (size < 1 || frame.size > FRAME_LIMIT || frame.writer >= end->plan->writers ||
		    frame.sequence != expected[frame.writer]++) {
			report_mismatch(end, (char *)&frame, sizeof(frame), 0);
			return LEFT;
		}
		if (take_all(end, end->buffer, size))
			return ENDED;
		voice.key = frame_key(end, !end->side, &frame);
		speak(&voice, payload, size);
		if (memcmp(payload, end->buffer, size)) {
			report_mismatch(end, end->buffer, size, 0);
			return LEFT;
		}
		end->theirs.position += frame.size;
	}
	return FINE;
}

static enum outcome frames(struct end *end)
{
	struct writers writers = {.end = end, .lock = PTHREAD_MUTEX_INITIALIZER};
	int room = 212992;
	enum outcome outcome;

	setsockopt(end->fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
	for (uint32_t i = 0; i < end->plan->writers; i++) {
		writers.one[i].all = &writers;
		writers.one[i].index = i;
		if (pthread_create(&writers.one[i].thread, NULL, write_frames, &writers.one[i]))
			err(1, "pthread_create");
	}
	outcome = hear_frames(end);
	if (outcome != FINE && !writers.broken++)
		shutdown(end->fd, SHUT_RDWR);
	for (uint32_t i = 0; i < end->plan->writers; i++)
		pthread_join(writers.one[i].thread, NULL);
	if (outcome != FINE)
		return outcome;
	shutdown(end->fd, SHUT_WR);
	return hear_end(end);
}

static enum outcome (*const kinds[KINDS])(struct end *) = {
	[PING_PONG] = ping_pong, [DUPLEX] = duplex, [ONE_WAY] = one_way,
	[EVENTS] = events,	 [FRAMES] = frames,
};

/* ---- Connections
 * --------------------------------------------------------------------------------- */

static void converse(int fd, uint32_t number, struct slot *slot, char *buffer)
{
	struct plan plan = draw_plan(run.seed, number);
	struct end end = {
		.fd = fd,
		.side = run.side,
		.plan = &plan,
		.slot = slot,
		.mine = {key_of(number, run.side), 0},
		.theirs = {key_of(number, !run.side), 0},
		.dice = dice_of(run.seed, number, 2 + run.side),
		.buffer = buffer,
		.poller = -1,
		.is_ready = 1,
	};
	const struct manner *manner = manner_of(&end);
	enum outcome outcome;
	int one = 1;

	set_nonblocking(fd, manner->is_nonblocking || manner->toggles);
	if (manner->is_nonblocking && manner->waiting != POLL)
		end.poller = open_poller(fd, manner);
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	slot->number = number + 1;
	outcome = greet(&end);
	if (outcome == FINE)
		outcome = kinds[plan.kind](&end);
	if (end.poller >= 0)
		close(end.poller);
	switch (outcome) {
	case FINE:
		shared->connections++;
		shared->by_kind[plan.kind]++;
		break;
	default:
		shared->aborted += plan.aborts;
	}
}

static void begin(struct slot *slot, uint32_t port)
{
	slot->number = 0;
	slot->said = slot->heard = 0;
	slot->reported = 0;
	slot->progress_ms = now_ms();
	slot->port = port;
}

static void *serve_connections(void *argument)
{
	struct slot *slot = argument;
	char *buffer = malloc(BUFFER + 1);
	struct pollfd pollers[2] = {{run.listeners[0], POLLIN, 0}, {run.listeners[1], POLLIN, 0}};

	for (;;) {
		struct address peer = {.size = sizeof(peer.v6)};
		uint32_t preface[2];
		int fd;

		poll(pollers, 2, -1);
		fd = accept4(run.listeners[!pollers[0].revents], &peer.any, &peer.size,
			     SOCK_NONBLOCK);
		if (fd < 0)
			continue;
		begin(slot, ntohs(peer.v4.sin_port));
		/* One segment: all of it is there, or nothing. */
		wait_for(fd, POLLIN);
		if (recv(fd, preface, sizeof(preface), 0) == sizeof(preface)) {
			if (preface[0] == MAGIC)
				converse(fd, preface[1], slot, buffer);
			else
				tell("{\"event\":\"mismatch\",\"connection\":null,\"port\":%u,"
				     "\"found\":\"no preface\"}\n",
				     slot->port);
		}
		close(fd);
		slot->port = 0;
	}
	return NULL;
}

static int connected(const struct plan *plan, struct slot *slot)
{
	int deferred = plan->deferred && run.target[1].v4.sin_port;
	const struct address *target = &run.target[deferred];
	int fd = socket(target->any.sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
	struct address own = {.size = sizeof(own.v6)};

	setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &one, sizeof(one));
	if (bind(fd, &run.source.any, run.source.size) || connect(fd, &target->any, target->size)) {
		tell("{\"event\":\"refused\",\"connection\":%u,\"error\":\"%s\"}\n", plan->number,
		     strerror(errno));
		close(fd);
		return -1;
	}
	getsockname(fd, &own.any, &own.size);
	begin(slot, ntohs(own.v4.sin_port));
	return fd;
}

/* In one segment, sent as the rest is. */
static ssize_t send_preface(int fd, const struct plan *plan, const void *preface, size_t size)
{
	struct iovec part = {(void *)preface, size};
	struct mmsghdr message = {{.msg_iov = &part, .msg_iovlen = 1}, 0};

	if (plan->manner[CLIENT].writing != SEND_MMSG)
		return send(fd, preface, size, MSG_NOSIGNAL);
	return sendmmsg(fd, &message, 1, MSG_NOSIGNAL) == 1 ? (ssize_t)message.msg_len : -1;
}

static void *make_connections(void *argument)
{
	struct slot *slot = argument;
	char *buffer = malloc(BUFFER + 1);

	while (!shared->stop) {
		uint32_t number = shared->next++;
		struct plan plan = draw_plan(run.seed, number);
		uint32_t preface[2] = {MAGIC, number};
		int fd;

		if (run.count && number - run.first >= run.count)
			break;
		fd = connected(&plan, slot);
		if (fd < 0) {
			nap(100000);
			continue;
		}
		slot->number = number + 1;
		set_nonblocking(fd, plan.manner[CLIENT].is_nonblocking);
		if (send_preface(fd, &plan, preface, sizeof(preface)) == sizeof(preface))
			converse(fd, number, slot, buffer);
		close(fd);
		slot->port = 0;
	}
	return NULL;
}

/* ---- Processes
 * ------------------------------------------------------------------------------------- */

static void work(struct worker *worker)
{
	void *(*job)(void *) = run.side == CLIENT ? make_connections : serve_connections;
	pthread_t threads[MAX_SLOTS];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	signal(SIGTERM, SIG_DFL);
	signal(SIGPIPE, SIG_IGN);
	for (int i = 0; i < run.at_once; i++)
		if (pthread_create(&threads[i], NULL, job, &worker->slots[i]))
			err(1, "pthread_create");
	for (int i = 0; i < run.at_once; i++)
		pthread_join(threads[i], NULL);
	_exit(0);
}

static void start(struct worker *worker)
{
	pid_t pid;

	memset(worker, 0, sizeof(*worker));
	pid = fork();
	if (pid < 0)
		err(1, "fork");
	if (!pid)
		work(worker);
	worker->pid = pid; /* not in the child, which shares this memory */
}

/* Tells which connections a worker had when it died. */
static void bury(struct worker *worker, const char *event)
{
	for (int i = 0; i < run.at_once; i++) {
		struct slot *slot = &worker->slots[i];

		if (slot->port)
			tell("{\"event\":\"%s\",\"connection\":%lld,\"port\":%u}\n", event,
			     (long long)slot->number - 1, slot->port);
	}
	worker->pid = 0;
}

/* Also of those that it has accepted and not yet written down: its descriptors have them all. */
static void tell_accepted(pid_t pid)
{
	int process = syscall(SYS_pidfd_open, pid, 0);

	for (int number = 3; process >= 0 && number < 1024; number++) {
		int fd = syscall(SYS_pidfd_getfd, process, number, 0);
		struct address peer = {.size = sizeof(peer.v6)};

		if (fd >= 0 && !getpeername(fd, &peer.any, &peer.size))
			tell("{\"event\":\"killed\",\"connection\":-1,\"port\":%u}\n",
			     ntohs(peer.v4.sin_port));
		close(fd);
	}
	close(process);
}

static void kill_worker(struct worker *worker)
{
	if (!worker->pid)
		return;
	if (run.side == SERVER && !kill(worker->pid, SIGSTOP)) {
		waitpid(worker->pid, NULL, WUNTRACED);
		tell_accepted(worker->pid);
	}
	kill(worker->pid, SIGKILL);
	waitpid(worker->pid, NULL, 0);
	bury(worker, "killed");
}

/* Tells of connections without progress, and ends them once they can have been looked at. */
static void look_for_stalled(struct worker *worker)
{
	int hopeless = 0;

	for (int i = 0; i < run.at_once; i++) {
		struct slot *slot = &worker->slots[i];
		int64_t idle = now_ms() - slot->progress_ms;

		if (!slot->port || idle < STALLED_MS)
			continue;
		if (!slot->reported++)
			tell("{\"event\":\"stalled\",\"connection\":%lld,\"port\":%u,\"side\":%d,"
			     "\"pid\":%d,\"said\":%lld,\"heard\":%lld}\n",
			     (long long)slot->number - 1, slot->port, run.side, worker->pid,
			     (long long)slot->said, (long long)slot->heard);
		hopeless |= idle > STALLED_MS + DIAGNOSIS_MS;
	}
	if (hopeless)
		kill_worker(worker);
}

/* Starts what is missing, notices what has died. Returns how many workers there are. */
static int look_after(struct worker *worker, int wanted)
{
	int status;

	if (worker->pid && waitpid(worker->pid, &status, WNOHANG) == worker->pid) {
		if (status)
			tell("{\"event\":\"crashed\",\"status\":%d}\n", status);
		bury(worker, "killed");
		if (run.side == CLIENT && !status)
			return 0;
	}
	if (!worker->pid && wanted)
		start(worker);
	return worker->pid != 0;
}

static volatile sig_atomic_t terminated;

static void terminate(int signal)
{
	(void)signal;
	terminated = 1;
}

static void supervise(void)
{
	int64_t ends = now_ms() + run.seconds * 1000LL;
	struct dice dice = dice_of(run.seed, now_ms(), 3);
	int alive = 1, started = 0;

	while (alive) {
		shared->stop |= terminated || (run.seconds && now_ms() > ends);
		if (run.side == SERVER && shared->stop)
			break;
		alive = 0;
		for (int i = 0; i < WORKERS; i++) {
			alive += look_after(&shared->workers[i],
					    !shared->stop && !(run.count && started));
			look_for_stalled(&shared->workers[i]);
		}
		started = 1;
		if (!shared->stop && below(&dice, 2000) < run.kills)
			kill_worker(&shared->workers[below(&dice, WORKERS)]);
		nap(50000);
	}
	for (int i = 0; i < WORKERS; i++)
		if (shared->workers[i].pid)
			kill_worker(&shared->workers[i]);
}

static void tell_totals(void)
{
	tell("{\"event\":\"done\",\"side\":%d,\"connections\":%lld,\"aborted\":%lld,\"said\":%lld,"
	     "\"heard\":%lld,\"mismatches\":%lld,\"next\":%u,"
	     "\"ping_pong\":%lld,\"duplex\":%lld,\"one_way\":%lld,\"events\":%lld,\"frames\":%lld}"
	     "\n",
	     run.side, (long long)shared->connections, (long long)shared->aborted,
	     (long long)shared->said, (long long)shared->heard, (long long)shared->mismatches,
	     shared->next, (long long)shared->by_kind[0], (long long)shared->by_kind[1],
	     (long long)shared->by_kind[2], (long long)shared->by_kind[3],
	     (long long)shared->by_kind[4]);
}

static struct address address(const char *ip, const char *port)
{
	struct address parsed = {.size = sizeof(parsed.v4)};

	parsed.v4.sin_family = AF_INET;
	if (inet_pton(AF_INET, ip, &parsed.v4.sin_addr) != 1) {
		memset(&parsed, 0, sizeof(parsed));
		parsed.size = sizeof(parsed.v6);
		parsed.v6.sin6_family = AF_INET6;
		if (inet_pton(AF_INET6, ip, &parsed.v6.sin6_addr) != 1)
			errx(2, "%s is no IP address", ip);
	}
	parsed.v4.sin_port = htons(atoi(port));
	return parsed;
}

static void open_listeners(void)
{
	run.listeners[1] = -1;
	for (int i = 0; i < 2 && run.target[i].v4.sin_port; i++) {
		const struct address *own = &run.target[i];
		int fd = socket(own->any.sa_family, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;

		setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
		/* For TPROXY. It fails without CAP_NET_RAW, where no test needs it. */
		setsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &one, sizeof(one));
		if (i)
			setsockopt(fd, IPPROTO_TCP, TCP_DEFER_ACCEPT, &one, sizeof(one));
		if (bind(fd, &own->any, own->size) || listen(fd, 1024))
			err(1, "listen");
		run.listeners[i] = fd;
	}
}

int main(int argc, char **argv)
{
	int serves = argc == 7 && !strcmp(argv[1], "serve");

	if (!serves && !(argc == 12 && !strcmp(argv[1], "drive")))
		errx(2, "usage: see the head of stream.c");
	run.side = serves ? SERVER : CLIENT;
	run.seed = strtoull(argv[2], NULL, 0);
	run.kills = atoi(argv[3]);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
		      0);
	if (shared == MAP_FAILED)
		err(1, "mmap");
	if (serves) {
		run.target[0] = address(argv[4], argv[5]);
		run.target[1] = address(argv[4], argv[6]);
		run.at_once = MAX_SLOTS;
		open_listeners();
	} else {
		run.source = address(argv[4], "0");
		run.target[0] = address(argv[5], argv[6]);
		run.target[1] = address(argv[5], argv[7]);
		shared->next = run.first = strtoul(argv[8], NULL, 0);
		run.count = strtoul(argv[9], NULL, 0);
		run.seconds = atoi(argv[10]);
		run.at_once = (atoi(argv[11]) + WORKERS - 1) / WORKERS;
	}
	signal(SIGTERM, terminate);
	tell("{\"event\":\"ready\"}\n");
	supervise();
	tell_totals();
	return 0;
}
