"""Edits as one pass over memory: recorded operations become C.

`translation` records what an edit does and writes it into `templates`, `native` compiles and runs
it, `fused` is the door: only `apply` comes in by it.
"""
