"""Real metrics of a live module: `open(pair)` gives a function from a module to `Scores`."""
