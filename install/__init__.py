"""The node's side: the node program, and how everything gets onto a node."""

VERSION = "0.1.0"  # as in pyproject.toml, which the image does not have
