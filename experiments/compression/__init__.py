"""What codes of deltas lose at equal true bits, from the points of `experiment=compression`.

Settings are chosen on half A of the objective's examples, and everything is judged on half B; the
checks were written before the points were run.
"""
