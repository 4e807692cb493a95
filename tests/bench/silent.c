// SPDX-License-Identifier: Apache-2.0
/*
 * Connections that live and are silent.
 *
 *   silent serve ADDRESS PORT PORTS         listens on PORT, PORT + 1, ... (PORTS of them), prints
 *                                          "ready", echoes single bytes, keeps every connection
 *   silent hold SOURCE ADDRESS PORT PORTS   for each number on standard input: opens connections,
 *                                          one byte there and back on each, until so many live;
 *                                          then prints the number. Ends with standard input
 *
 * One process per port at either end, since a process may have 20,000 open files here and there,
 * and since one tuple of addresses has 64,000 connections at most.
 */
#define _GNU_SOURCE
#include "endpoint.h"
#include <signal.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

/* Returns 0 in a child, which ends with its parent. */
static pid_t fork_child(void)
{
	pid_t pid = fork();

	if (pid < 0)
		err(1, "fork");
	if (!pid && prctl(PR_SET_PDEATHSIG, SIGKILL))
		err(1, "prctl");
	return pid;
}

static void watch(int epoll, int fd)
{
	struct epoll_event event = {EPOLLIN, {.fd = fd}};

	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		err(1, "epoll_ctl");
}

static void echo(int listener)
{
	int epoll = epoll_create1(0);

	watch(epoll, listener);
	for (;;) {
		struct epoll_event event;
		int fd;
		char byte;

		if (epoll_wait(epoll, &event, 1, -1) < 0)
			err(1, "epoll_wait");
		fd = event.data.fd;
		if (fd == listener) {
			fd = accept(listener, NULL, NULL);
			if (fd < 0)
				err(1, "accept");
			watch(epoll, fd);
		} else if (recv(fd, &byte, 1, 0) == 1) {
			send_all(fd, &byte, 1);
		} else {
			close(fd);
		}
	}
}

static void serve(const char *address, unsigned port, unsigned ports)
{
	for (unsigned i = 0; i < ports; i++) {
		struct endpoint own = endpoint(address, port + i);
		int listener = listening(&own);

		if (!fork_child())
			echo(listener);
		close(listener);
	}
	puts("ready");
	fflush(stdout);
	pause();
}

/* Opens connections, says so with a byte, and keeps them. */
static void keep(const struct endpoint *own, const struct endpoint *server, unsigned count,
		 int done)
{
	char byte = 0;

	for (unsigned i = 0; i < count; i++) {
		int fd = connected(own, server);

		if (!send_all(fd, &byte, 1) || !receive_all(fd, &byte, 1))
			errx(1, "connection %u of %u got no answer", i, count);
	}
	if (write(done, &byte, 1) != 1)
		err(1, "write");
	pause();
}

/* Each port's child opens its share of the connections that are to come. */
static void grow(const struct endpoint *own, const char *address, unsigned port, unsigned ports,
		 unsigned count)
{
	int done[2];
	char byte;

	if (pipe(done))
		err(1, "pipe");
	for (unsigned i = 0; i < ports; i++) {
		struct endpoint server = endpoint(address, port + i);
		unsigned share = count / ports + (i < count % ports);

		if (!fork_child())
			keep(own, &server, share, done[1]);
	}
	close(done[1]);
	for (unsigned i = 0; i < ports; i++)
		if (read(done[0], &byte, 1) != 1)
			errx(1, "no %u more connections", count);
	close(done[0]);
}

static void hold(const char *source, const char *address, unsigned port, unsigned ports)
{
	struct endpoint own = endpoint(source, 0);
	unsigned live = 0, wanted;

	while (scanf("%u", &wanted) == 1) {
		grow(&own, address, port, ports, wanted > live ? wanted - live : 0);
		live = wanted;
		printf("%u\n", live);
		fflush(stdout);
	}
}

int main(int argc, char **argv)
{
	unsigned ports = argc > 4 ? number(argv[argc - 1]) : 0;
	struct rlimit files;

	if (getrlimit(RLIMIT_NOFILE, &files))
		err(1, "getrlimit");
	files.rlim_cur = files.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &files))
		err(1, "setrlimit");
	if (argc == 5 && !strcmp(argv[1], "serve"))
		serve(argv[2], number(argv[3]), ports);
	else if (argc == 6 && !strcmp(argv[1], "hold"))
		hold(argv[2], argv[3], number(argv[4]), ports);
	else
		errx(2, "usage: silent serve ADDRESS PORT PORTS | "
			"hold SOURCE ADDRESS PORT PORTS");
	return 0;
}
