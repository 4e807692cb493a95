"""The agent: keeps one node as `install` and `load` have made it."""
