"""The phase diagram: what edits do to deltas of many sizes of one base.

`runs` trains the series (`python -m experiments.regime`), `study` makes the card, `patterns` draws
what its checks must see, and what they must not.
"""
