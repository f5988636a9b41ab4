"""Which edit to use: candidates ranked by a cheap prediction, the best few measured.

`goals` says what is asked for, `candidates` what there is to choose from, `prediction` what each
is expected to take and to cost, `search` which to measure next, `command` is `deltalab-choose`.
"""
