"""Benchmarks: both sides of every claim in one process or script."""
