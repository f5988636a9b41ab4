"""Real metrics of a live module: `open(pair)` gives a function from a module to `Scores`.

Accuracy on images (`accuracy`), lm-eval's tasks (`lm_eval`, whose parts are in `lm`), and what
they all return (`scores`).
"""
