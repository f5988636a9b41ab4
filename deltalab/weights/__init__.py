"""Mappings from names to tensors: checkpoints, pairs, deltas, and which tensors are meant.

`mapping` is the one interchange type; `headers` and `pickles` check what a file claims before it is
read; `select`, `finite`, `threshold` and `factor` say which tensors, and what is in them.
"""
