"""The tables and figures of arXiv 2410.13841, and three studies beyond it, from finished records.

`deltalab -m experiment=NAME` runs the points, `python -m experiments.paper NAME` makes of them
figures, tables, a verdict on the paper's claim by checks that were fixed beforehand, and one line a
point in a JSON lines file, all below `DIR/paper/`.
"""
