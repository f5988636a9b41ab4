"""Edits that are made for small files: each has a code, and bits that it can be told to spend.

They are edits like those in `edits`, one a file, named in `conf/edit`; what they quantise with lies
in `codes`, and what spreads bits over tensors in `budgets`.
"""
