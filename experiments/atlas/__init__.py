"""The atlas: every edit and code that asks for nothing but a pair, on all embedded pairs.

`study` makes its card, which opens the page; `patterns` draws what its checks must see, and what
they must not.
"""
