# SPDX-License-Identifier: Apache-2.0
"""`estimate`: what of a node's traffic would bypass TCP/IP. It only looks."""
