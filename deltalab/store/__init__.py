"""What is kept on disk: records under their keys, and the files around them.

Whole files or none (`files`), one writer at a time (`locks`), records under their keys (`records`),
and artefacts of bounded size (`eviction`). Nothing here imports torch.
"""
