/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The program that a runtime executes. It starts the frozen plugin by the loader and the C library
 * in its own folder. So it does not matter which C library the node has, if any. This program uses
 * none.
 *
 * The plugin gets CNI's variables and no others. LD_PRELOAD, a locale and the like are made for the
 * node's own C library, and may harm another one.
 *
 * Where the plugin cannot run, this program answers in its place, as a plugin that does nothing:
 * pods start and end. Its folder may be damaged. Or there is none: `uninstall` leaves this program
 * alone, for runtimes that still have our entry in a configuration that they have read before.
 */
#include <asm/signal.h>
#include <asm/unistd.h>
#include <linux/auxvec.h>
#include <linux/fcntl.h>
#include <linux/fs.h>
#include <linux/limits.h>
#include <linux/prctl.h>
#include <stdbool.h>

#define MAX_CALL (1 << 20) /* bytes that a runtime may say to a plugin */
#define REFUSED 3	   /* cni_plugin/__main__.py: the plugin has answered with an error */

#define CANNOT_RUN                                                                                 \
	"tcpip-bypass: warning: it cannot run, and answers as a plugin that does nothing: it "     \
	"was removed from this node, or its folder is damaged: `tcpip-bypass-node install`\n"
/* install/program/trial.py knows this one. */
#define KILLED                                                                                     \
	"tcpip-bypass: warning: it was killed, perhaps for want of memory, and answers as a "      \
	"plugin that does nothing\n"
#define VERSIONS                                                                                   \
	"{\"cniVersion\": \"1.1.0\", \"supportedVersions\": [\"0.3.0\", \"0.3.1\", "               \
	"\"0.4.0\", \"1.0.0\", \"1.1.0\"]}\n"
#define NO_RESULT                                                                                  \
	"{\"cniVersion\": \"1.0.0\", \"code\": 11, \"msg\": \"tcpip-bypass cannot run on this "    \
	"node, and the call has no prevResult to be passed on: install it again, or take its "     \
	"entry out of the network configuration\"}\n"
#define NO_COMMAND                                                                                 \
	"{\"cniVersion\": \"1.0.0\", \"code\": 4, \"msg\": \"CNI_COMMAND is missing or "           \
	"unknown\"}\n"

static char path[2 * PATH_MAX], target[PATH_MAX];
/* PyInstaller's bootloader knows a loader by this form of its name: ld-NAME.so.N. */
static char loader[sizeof(path) + sizeof("ld-glibc.so.2")];
static char libraries[sizeof(path) + sizeof("_internal")];
static char archive[sizeof("_PYI_ARCHIVE_FILE=") + sizeof(path) + sizeof("plugin")];
static char call[MAX_CALL];

static long system_call(long number, long first, const void *second, const void *third, long fourth)
{
#if defined(__x86_64__)
	register long r10 __asm__("r10") = fourth;

	__asm__ volatile("syscall"
			 : "+a"(number)
			 : "D"(first), "S"(second), "d"(third), "r"(r10)
			 : "rcx", "r11", "memory");
	return number;
#elif defined(__aarch64__)
	register long x8 __asm__("x8") = number;
	register long x0 __asm__("x0") = first;
	register const void *x1 __asm__("x1") = second;
	register const void *x2 __asm__("x2") = third;
	register long x3 __asm__("x3") = fourth;

	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
	return x0;
#else
#error "its system calls are not written down here"
#endif
}

/* Appends text, and returns the end of the whole. */
static char *put(char *at, const char *text)
{
	while ((*at = *text++))
		at++;
	return at;
}

static bool has_prefix(const char *text, const char *prefix)
{
	while (*prefix)
		if (*text++ != *prefix++)
			return false;
	return true;
}

static bool is_equal(const char *a, const char *b)
{
	return has_prefix(a, b) && has_prefix(b, a);
}

static bool write_to(long fd, const char *text, const char *end)
{
	while (text < end) {
		long written = system_call(__NR_write, fd, text, (const void *)(end - text), 0);

		if (written <= 0)
			return false;
		text += written;
	}
	return true;
}

#define SAY(fd, text)                                                                              \
	do {                                                                                       \
		static const char said[] = text;                                                   \
		write_to(fd, said, said + sizeof(said) - 1);                                       \
	} while (0)

static long follow(const char *link)
{
	return system_call(__NR_readlinkat, AT_FDCWD, link, target, PATH_MAX - 1);
}

/* Where in path the name of the file begins. */
static char *file_name(void)
{
	char *found = path;

	for (char *at = path; *at; at++)
		if (*at == '/')
			found = at + 1;
	return found;
}

/* Leaves in path the folder of the file that a link leads to, over any others. */
static void find_folder(const char *link)
{
	long length;

	put(path, link);
	while ((length = follow(path)) > 0) {
		target[length] = 0;
		put(*target == '/' ? path : file_name(), target);
	}
	*file_name() = 0;
}

/* Behind the string that begins at a quote. */
static char *skip_string(char *at)
{
	for (at++; *at && *at != '"'; at++)
		if (*at == '\\' && at[1])
			at++;
	return *at ? at + 1 : at;
}

/* Behind a JSON value: where the next member begins, or the object ends. */
static char *skip_value(char *at)
{
	long depth = 0;

	while (*at) {
		if (*at == '"') {
			at = skip_string(at);
			continue;
		}
		if (depth == 0 && (*at == ',' || *at == '}'))
			break;
		depth += (*at == '{' || *at == '[') - (*at == '}' || *at == ']');
		at++;
	}
	return at;
}

static bool is_space(char c)
{
	return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

static char *skip_to(char *at, char wanted)
{
	while (*at && *at != wanted)
		at++;
	return at;
}

/* Puts what the runtime says into a file, where it can be read again after the plugin. */
static void keep_call(void)
{
	long file = system_call(__NR_memfd_create, (long)"call", 0, 0, 0), length;

	/* 0: standard input is closed, and stays so */
	while (file > 0 &&
	       (length = system_call(__NR_read, 0, call, (const void *)MAX_CALL, 0)) > 0)
		write_to(file, call, call + length);
	if (file > 0)
		system_call(__NR_dup3, file, 0, 0, 0);
	if (file >= 0)
		system_call(__NR_close, file, 0, 0, 0);
	system_call(__NR_lseek, 0, 0, SEEK_SET, 0);
}

/* Writes the call's prevResult, as a chained plugin that changes nothing. */
static bool pass_on(void)
{
	static const char key[] = "\"prevResult\"";
	char *at, *end;
	long length = 0, more;

	system_call(__NR_lseek, 0, 0, SEEK_SET, 0);
	while ((more = system_call(__NR_read, 0, call + length,
				   (const void *)(MAX_CALL - 1 - length), 0)) > 0)
		length += more;
	if (more < 0 || length == MAX_CALL - 1)
		return false;
	for (at = skip_to(call, '{'); *at && *at != '}'; at = end) {
		char *name = skip_to(at + 1, '"'), *value = skip_to(skip_string(name), ':') + 1;

		if (!value[-1])
			return false;
		end = skip_value(value);
		if (!has_prefix(name, key))
			continue;
		while (is_space(*value))
			value++;
		if (*value != '{' || !*end)
			return false;
		return write_to(1, value, end);
	}
	return false;
}

/* Answers in the plugin's place. Returns the exit status. */
static long answer(const char *command)
{
	if (is_equal(command, "DEL") || is_equal(command, "CHECK") || is_equal(command, "GC") ||
	    is_equal(command, "STATUS"))
		return 0;
	if (is_equal(command, "VERSION")) {
		SAY(1, VERSIONS);
		return 0;
	}
	if (is_equal(command, "ADD")) {
		if (pass_on())
			return 0;
		SAY(1, NO_RESULT);
	} else {
		SAY(1, NO_COMMAND);
	}
	return 1;
}

/* The beginning of struct sigaction. */
static void on_signal(long signal, long handler)
{
	long action[4] = {handler};

	system_call(__NR_rt_sigaction, signal, action, 0, sizeof(long));
}

/* Runs the plugin, which ends with this process. Returns its status as wait4(2) has it. */
static long run(char **arguments, char **environment)
{
	long parent = system_call(__NR_getpid, 0, 0, 0, 0), child;
	int status = -1;

	on_signal(SIGCHLD, 0); /* a runtime may ignore it: the status would be lost */
	child = system_call(__NR_clone, SIGCHLD, 0, 0, 0);
	if (child == 0) {
		system_call(__NR_prctl, PR_SET_PDEATHSIG, (void *)SIGKILL, 0, 0);
		if (system_call(__NR_getppid, 0, 0, 0, 0) == parent)
			system_call(__NR_execve, (long)loader, arguments, environment, 0);
		SAY(2, "tcpip-bypass: ld-glibc.so.2 in its folder cannot be executed\n");
		system_call(__NR_exit_group, 127, 0, 0, 0);
	}
	if (child < 0) /* the plugin can take this one */
		system_call(__NR_execve, (long)loader, arguments, environment, 0);
	system_call(__NR_wait4, child, &status, 0, 0);
	return status;
}

/* The stack as the kernel makes it: argc, arguments, 0, variables, 0, pairs of numbers, 0. */
__attribute__((used)) void start(long *stack)
{
	char **variables = (char **)stack + 1 + stack[0] + 1;
	const char *command = "";
	long count = 0, status;
	bool was_killed;

	while (variables[count])
		count++;
	long *pair = (long *)variables + count + 1;
	while (pair[0] != AT_EXECFN)
		pair += 2;
	/* Where /proc is missing or of other processes, the name that it was executed by serves. */
	find_folder(follow("/proc/self/exe") > 0 ? "/proc/self/exe" : (char *)pair[1]);

	put(put(loader, path), "ld-glibc.so.2");
	put(put(libraries, path), "_internal");
	char *program = put(archive, "_PYI_ARCHIVE_FILE=");
	put(put(program, path), "plugin");
	char *arguments[] = {loader, "--library-path", libraries, program, 0};
	char *environment[count + 4], **next = environment;
	/* Because of these two the bootloader does not start itself again to set a library path. */
	*next++ = archive;
	*next++ = "_PYI_PARENT_PROCESS_LEVEL=-1";
	*next++ = "_PYI_LINUX_PROCESS_NAME=tcpip-bypass";
	for (; *variables; variables++) {
		if (has_prefix(*variables, "CNI_"))
			*next++ = *variables;
		if (has_prefix(*variables, "CNI_COMMAND="))
			command = *variables + sizeof("CNI_COMMAND");
	}
	*next = 0;
	if (is_equal(command, "ADD"))
		keep_call();
	status = run(arguments, environment);
	was_killed = (status & 0x7f) == SIGKILL;
	if (was_killed && is_equal(command, "ADD")) /* the runtime calls it again */
		system_call(__NR_kill, system_call(__NR_getpid, 0, 0, 0, 0), (void *)SIGKILL, 0, 0);
	if (status == REFUSED << 8) {
		status = 1;
	} else if (status != 0) {
		on_signal(SIGPIPE, 1); /* SIG_IGN */
		status = answer(command);
		if (was_killed)
			SAY(2, KILLED);
		else
			SAY(2, CANNOT_RUN);
	}
	for (;;)
		system_call(__NR_exit_group, status, 0, 0, 0);
}

#if defined(__x86_64__)
__asm__(".globl _start\n_start: mov %rsp, %rdi\n\tand $-16, %rsp\n\tcall start");
#else
__asm__(".globl _start\n_start: mov x0, sp\n\tbl start");
#endif
