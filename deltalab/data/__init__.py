"""What a model is fed: images (`images`, each of them as `pictures` reads it), and texts as tokens (`text`, `tokens`).

`rows` reads the rows of files and data sets and `formats` their formats; a source is a frozen
dataclass that opens to batches.
"""
