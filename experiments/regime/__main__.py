"""Train the series of deltas: `python -m experiments.regime [DIR]`, by default into `results`.

Cost: ten core minutes. Expected: |delta|/|W| from about .005 to above .8, losses that
fall and, at the highest rates, rise again.
"""

import sys
from pathlib import Path

from experiments.regime import runs

if __name__ == "__main__":
    results = Path(sys.argv[1] if len(sys.argv) > 1 else "results")
    rows = runs.make(results / "models" / "regime")
    (results / "zoo").mkdir(parents=True, exist_ok=True)
    runs.publish(rows, results / "zoo" / "regime.json")
