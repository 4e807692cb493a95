/* SPDX-License-Identifier: GPL-2.0-only */
/* bcc includes this first. Stands in for the kernel's own headers, which most nodes lack and
 * which break bcc when they are newer than its clang. */
#define CONFIG_BPF_SYSCALL 1
