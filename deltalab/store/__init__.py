"""What outlives a process: files that appear whole, keys, contents' digests.

Nothing here imports torch, so that a finished point is recognised at once.
"""
