"""Edits as one pass over memory: recorded operations become C, or a compiled function.

`translation` records what an edit does, `native` writes and compiles the C, `fused` chooses. Only
`apply` imports this package.
"""
