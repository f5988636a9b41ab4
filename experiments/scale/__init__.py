"""Sweeps that are killed, that fill the disk, and that have 10,000 points."""
