"""The node's side: the node program, and how everything gets onto a node."""
