/* SPDX-License-Identifier: GPL-2.0-only */
/* Found in place of the kernel's when tcpip_bypass.c is compiled for this machine: see kernel.h. */
#include <linux/bpf.h>
#include "kernel.h"
