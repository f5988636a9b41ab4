"""Where a finished point's record is sent, after it is safe on disk.

`trackers` holds the trackers and `runs` shows a record as one run of W&B.
"""
