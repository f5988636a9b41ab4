"""Real metrics of a live module: `open(pair)` gives a function from a module to `Scores`.

Accuracy on images (`accuracy`), and lm-eval's tasks (`lm_eval`, whose parts are in `lm`).
"""
