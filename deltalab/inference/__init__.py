"""What a causal language model says of many prompts, what they share computed once.

`beginnings` finds what rows of tokens share, `passes` keeps its keys and values, `scoring` gives
log-likelihoods and `greedy` texts, in passes that fill a `budget` of tokens.
"""
