"""An edit on a tensor and on a model (`editing`), and from disk to disk (`stream`).

`layout` says what the files of a checkpoint become, `extras` gives an edit what it asks for beside
the delta, `audit` counts what it did, `work` has it all done by threads.
"""
