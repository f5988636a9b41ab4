"""What a model is fed: images (`images`), and texts as tokens (`text`, `tokens`).

`rows` reads the rows of files and data sets and `formats` their formats; a source is a frozen
dataclass that opens to batches. `folders` says what of a directory of images counts,
`pictures` makes of any image file what a model is shown.
"""
