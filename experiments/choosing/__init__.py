"""deltalab-choose beside random search and Optuna's TPE, at the cost of what each measures.

`python -m experiments.choosing.grid` measures all candidates on five pairs once, and leaves the
points in `results/choosing`; `python -m experiments.choosing.compare` replays every search on them.
"""
