/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The program that a runtime executes. It starts the frozen plugin by the loader and the C library
 * in its own folder. So it does not matter which C library the node has, if any. This program uses
 * none.
 *
 * The plugin gets CNI's variables and no others. LD_PRELOAD, a locale and the like are made for the
 * node's own C library, and may harm another one.
 */
#include <asm/unistd.h>
#include <linux/auxvec.h>
#include <linux/fcntl.h>
#include <linux/limits.h>
#include <stdbool.h>

static const char no_loader[] =
	"{\"cniVersion\": \"1.0.0\", \"code\": 999, \"msg\": \"tcpip-bypass cannot start: "
	"ld-glibc.so.2 in its folder cannot be executed; install it again\"}\n";

static char path[2 * PATH_MAX], target[PATH_MAX];
/* PyInstaller's bootloader knows a loader by this form of its name: ld-NAME.so.N. */
static char loader[sizeof(path) + sizeof("ld-glibc.so.2")];
static char libraries[sizeof(path) + sizeof("_internal")];
static char archive[sizeof("_PYI_ARCHIVE_FILE=") + sizeof(path) + sizeof("plugin")];

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

/* The stack as the kernel makes it: argc, arguments, 0, variables, 0, pairs of numbers, 0. */
__attribute__((used)) void start(long *stack)
{
	char **variables = (char **)stack + 1 + stack[0] + 1;
	long count = 0;

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
	/* Without the plugin a pod still ends, and the node stays ready. */
	bool must_work = false;
	for (; *variables; variables++) {
		if (has_prefix(*variables, "CNI_"))
			*next++ = *variables;
		if (has_prefix(*variables, "CNI_COMMAND=DEL") ||
		    has_prefix(*variables, "CNI_COMMAND=STATUS"))
			must_work = true;
	}
	*next = 0;
	system_call(__NR_execve, (long)loader, arguments, environment, 0);

	if (!must_work)
		system_call(__NR_write, 1, no_loader, (const void *)(sizeof(no_loader) - 1), 0);
	for (;;)
		system_call(__NR_exit_group, !must_work, 0, 0, 0);
}

#if defined(__x86_64__)
__asm__(".globl _start\n_start: mov %rsp, %rdi\n\tand $-16, %rsp\n\tcall start");
#else
__asm__(".globl _start\n_start: mov x0, sp\n\tbl start");
#endif
