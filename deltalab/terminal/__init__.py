"""What people see and type: lines, progress, streams of any encoding, flags, mistakes in one line.

Every command begins and ends here; text from elsewhere has passed `store.shown` before.
"""
