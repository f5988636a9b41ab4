"""Errors of what was measured more than once: over examples, draws and pairs, and several at once.

Numbers in, numbers out; no record and no model is known here.
"""
