"""Tests that need no root and no BPF."""
