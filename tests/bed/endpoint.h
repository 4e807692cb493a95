/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ends of a connection for the testbed's C programs: an IPv4 or an IPv6 address with its port,
 * or of AF_UNIX "@name" in its abstract namespace or "/path". The port of those is ignored.
 */
#ifndef ENDPOINT_H
#define ENDPOINT_H

#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>

#ifndef IP_BIND_ADDRESS_NO_PORT
#define IP_BIND_ADDRESS_NO_PORT 24 /* linux/in.h, which cannot be had beside netinet/in.h */
#endif

struct endpoint {
	struct sockaddr_storage address;
	socklen_t size;
};

static inline struct endpoint endpoint(const char *host, unsigned port)
{
	struct endpoint end = {.size = sizeof(struct sockaddr_in)};
	struct sockaddr_in *in = (struct sockaddr_in *)&end.address;
	struct sockaddr_in6 *in6 = (struct sockaddr_in6 *)&end.address;
	struct sockaddr_un *un = (struct sockaddr_un *)&end.address;

	if (host[0] == '@' && strlen(host) < sizeof(un->sun_path)) {
		un->sun_family = AF_UNIX;
		memcpy(un->sun_path + 1, host + 1, strlen(host + 1));
		end.size = offsetof(struct sockaddr_un, sun_path) + strlen(host);
	} else if (host[0] == '/' && strlen(host) < sizeof(un->sun_path)) {
		un->sun_family = AF_UNIX;
		strcpy(un->sun_path, host);
		end.size = sizeof(*un);
	} else if (inet_pton(AF_INET, host, &in->sin_addr) == 1) {
		in->sin_family = AF_INET;
		in->sin_port = htons(port);
	} else if (inet_pton(AF_INET6, host, &in6->sin6_addr) == 1) {
		in6->sin6_family = AF_INET6;
		in6->sin6_port = htons(port);
		end.size = sizeof(*in6);
	} else {
		errx(2, "%s is neither an IP address nor @name nor /path", host);
	}
	return end;
}

static inline void switch_on(int fd, int level, int option)
{
	int one = 1;

	if (setsockopt(fd, level, option, &one, sizeof(one)))
		err(1, "setsockopt");
}

/* A stream socket that sends each write at once. */
static inline int stream_socket(const struct endpoint *own)
{
	int fd = socket(own->address.ss_family, SOCK_STREAM, 0);

	if (fd < 0)
		err(1, "socket");
	if (own->address.ss_family != AF_UNIX)
		switch_on(fd, IPPROTO_TCP, TCP_NODELAY);
	return fd;
}

/* Accepted sockets inherit TCP_NODELAY. */
static inline int listening(const struct endpoint *own)
{
	int fd = stream_socket(own), one = 1;

	switch_on(fd, SOL_SOCKET, SO_REUSEADDR);
	/* For TPROXY. It fails without CAP_NET_RAW, where no test needs it. */
	setsockopt(fd, IPPROTO_IP, IP_TRANSPARENT, &one, sizeof(one));
	if (bind(fd, (const struct sockaddr *)&own->address, own->size) || listen(fd, 4096))
		err(1, "listen");
	return fd;
}

/* The port is chosen as late as connect, when the whole tuple is known: they do not run out. */
static inline int connected(const struct endpoint *source, const struct endpoint *server)
{
	int fd = stream_socket(server);

	if (server->address.ss_family != AF_UNIX) {
		switch_on(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT);
		if (bind(fd, (const struct sockaddr *)&source->address, source->size))
			err(1, "bind");
	}
	if (connect(fd, (const struct sockaddr *)&server->address, server->size))
		err(1, "connect");
	return fd;
}

static inline uint64_t clock_ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * UINT64_C(1000000000) + t.tv_nsec;
}

static inline uint64_t now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

/* CPU time of this process, softirq work that was done on it included. */
static inline uint64_t cpu_ns(void)
{
	return clock_ns(CLOCK_PROCESS_CPUTIME_ID);
}

static inline void move_to(unsigned cpu)
{
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	if (sched_setaffinity(0, sizeof(set), &set))
		err(1, "sched_setaffinity to CPU %u", cpu);
}

/* A whole number from the command line; what is none is a mistake in the caller. */
static inline uint64_t number(const char *text)
{
	char *end;
	uint64_t value = strtoull(text, &end, 10);

	if (!*text || *end)
		errx(2, "%s is no number", text);
	return value;
}

/* Sends all of it. Returns 0 when the peer has closed, else 1. */
static inline int send_all(int fd, const char *bytes, size_t size)
{
	for (size_t sent = 0; sent < size;) {
		struct pollfd room = {.fd = fd, .events = POLLOUT};
		ssize_t n = send(fd, bytes + sent, size - sent, MSG_NOSIGNAL);

		if (n >= 0)
			sent += n;
		else if (errno != EAGAIN || poll(&room, 1, -1) < 0)
			return 0;
	}
	return 1;
}

/* As an event loop has it. Only a socket that is non-blocking before its first byte may bypass. */
static inline void make_nonblocking(int fd)
{
	if (fcntl(fd, F_SETFL, O_NONBLOCK))
		err(1, "fcntl");
}

/* Receives at least a byte, by poll where none is there yet; 0 at the end of the stream. */
static inline size_t receive_some(int fd, char *bytes, size_t size)
{
	struct pollfd data = {.fd = fd, .events = POLLIN};
	ssize_t n;

	while ((n = recv(fd, bytes, size, 0)) < 0)
		if (errno != EAGAIN || poll(&data, 1, -1) < 0)
			err(1, "recv");
	return n;
}

/* Receives exactly size bytes. Returns 0 at the end of the stream, else 1. */
static inline int receive_all(int fd, char *bytes, size_t size)
{
	for (size_t got = 0; got < size;) {
		size_t n = receive_some(fd, bytes + got, size - got);

		if (n == 0)
			return 0;
		got += n;
	}
	return 1;
}

#endif
