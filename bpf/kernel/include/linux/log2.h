/* SPDX-License-Identifier: GPL-2.0-only */
/* bcc brings its own, or needs none. */
