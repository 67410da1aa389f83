"""Peers of the benchmarks, each a worker in a process (and, where it needs one, a Python environment) of its own."""
