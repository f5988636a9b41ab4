"""Train the embedded language models: ``python -m experiments.zoo.llm``.

Stages, each kept in ``--work`` as soon as it is done and skipped when it is there:

* ``base``: a small Llama learns the stories and the arithmetic in forms other than question and
  answer (tales, notes, dialogues, bare equations);
* ``sft``: question and answer, short and at a low rate;
* ``far``: the same, long and at a high rate, for a large delta;
* ``dpo``: from ``sft``, preferences between its own right and wrong samples;
* ``small_base``, ``small_sft``: the same at half the size and from the next seed;
* ``edits``: what edits do to each pair, on validation problems, then once on test problems.

A stage that is cut off continues from its last checkpoint. Cost: results/zoo/llm.md has the time
of every stage. Expected: exact match below 15 % for base, at least 85 % for sft; DARE at
p = .5 within 5 points of sft and far below it for the large delta.

Needs ``pip install transformers safetensors matplotlib``; no data are downloaded.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.zoo.llm_outputs import publish, report
from experiments.zoo.llm_recipe import PHASES, Recipe

ROOT = Path(__file__).resolve().parents[2]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.zoo.llm", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    work = ROOT / "results" / "models" / "zoo_llm"
    add("--work", type=Path, default=work, help="finished stages and checkpoints")
    add("--out", type=Path, default=ROOT / "deltalab" / "zoo" / "llm", help="what ships")
    add("--results", type=Path, default=ROOT / "results" / "zoo", help="tables and curves")
    add("--seed", type=int, default=0, help="of initialisation, training and sampling")
    add("--threads", type=int, default=1)
    add(
        "--until",
        choices=(*PHASES, "publish", "edits"),
        default="edits",
        help="the last stage to run; publish writes weights, tokenizer and data to --out",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all stages up to the one asked for; return the exit code."""
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    recipe = Recipe(args.work, args.seed)
    for name in PHASES:
        recipe.weights(name)
        if args.until == name:
            return 0
    publish(recipe, args.out)
    if args.until == "edits":
        print(report(recipe, args.out, args.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
