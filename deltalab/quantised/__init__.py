"""Checkpoints whose weights are stored quantised: `told` sees them, `decoded` reads them.

Edits are of weights as they are, so that the one is refused and the other asked for by a setting.
"""
