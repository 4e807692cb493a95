"""Tests on real namespaces, cgroups, BPF programs and proxies; they need root."""
