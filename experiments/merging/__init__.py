"""What merges make of the experts of a family, from the finished points of `experiment=merging`.

Settings are chosen on half A of the objective's examples, and judged on half B and on test images;
the checks were written before the points were run.
"""
