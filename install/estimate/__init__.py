"""`estimate`: what of a node's traffic would bypass TCP/IP. It only looks."""
